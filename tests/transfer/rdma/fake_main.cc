// The conformance suite over a fabric within the process; nothing may be left of it in the end.
#include <gtest/gtest.h>

#include <cstdio>
#include <cstdlib>

#include "fake_verbs.h"

int main(int argc, char** argv) {
  setenv("MILLRACE_TEST_RDMA_SENDER", "a*", 1);
  setenv("MILLRACE_TEST_RDMA_RECEIVER", "b*", 1);
  millrace::transfer::rdma::FakeFabric fabric({"a0", "a1", "a2", "b0", "b1", "b2"});
  millrace::transfer::rdma::ReplaceSystemVerbs(fabric.verbs());
  testing::GTEST_FLAG(filter) = "Rails/Conformance.*";
  testing::InitGoogleTest(&argc, argv);
  const int failures = RUN_ALL_TESTS();
  if (fabric.live() == 0) return failures;
  std::fprintf(stderr, "objects that were not given back: %s\n", fabric.live_text().c_str());
  return 1;
}
