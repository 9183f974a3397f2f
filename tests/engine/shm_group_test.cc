// What is particular to ranks of one host.
#include "tests/engine/expert_group_rig.h"

namespace millrace::engine {
namespace {

TEST(ShmGroup, RefusesWhoDoesNotFit) {
  const GroupCase c;
  const auto place = MakeGroupPlace(2);
  const RandomTensors source(11);
  auto first = StartRank(c, source, *place, 0, 1, 0);
  ASSERT_TRUE(first.ok()) << first.status();
  const auto twice = StartRank(c, source, *place, 0, 1, 0);
  EXPECT_EQ(twice.status().code(), absl::StatusCode::kFailedPrecondition) << twice.status();
  EXPECT_NE(Message(twice.status()).find("rank 0 runs already"), std::string::npos) << twice.status();
  GroupCase other = c;
  other.quantization = Quantization::kInt8;
  const auto another = StartRank(other, source, *place, 1, 2, 0);
  EXPECT_EQ(another.status().code(), absl::StatusCode::kFailedPrecondition) << another.status();
  EXPECT_NE(Message(another.status()).find("weight format"), std::string::npos) << another.status();
  first = Unavailable("gone");
  EXPECT_TRUE(StartRank(other, source, *place, 0, 1, 0).ok());  // what was left behind does not matter
}

}  // namespace
}  // namespace millrace::engine
