#include "base/random.h"

#include <gtest/gtest.h>

#include <array>
#include <set>

namespace millrace {
namespace {

TEST(UniformAt, IsAPureFunctionAndUniform) {
  EXPECT_EQ(UniformAt(1, 2), UniformAt(1, 2));
  EXPECT_NE(UniformAt(1, 2), UniformAt(1, 3));
  EXPECT_NE(UniformAt(1, 2), UniformAt(2, 2));
  // Chi-square over 64 cells, 64,000 draws: mean 63, standard deviation 11.2; 130 is six of them away.
  for (const uint64_t seed : {0ULL, 1ULL, 0xffffffffffffffffULL}) {
    std::array<int, 64> cells{};
    for (uint64_t i = 0; i < 64000; ++i) {
      const double u = UniformAt(seed, i);
      ASSERT_GE(u, 0);
      ASSERT_LT(u, 1);
      ++cells[static_cast<size_t>(u * 64)];
    }
    double chi = 0;
    for (const int count : cells) chi += (count - 1000.0) * (count - 1000.0) / 1000.0;
    EXPECT_LT(chi, 130) << seed;
  }
}

TEST(RandomId, IsNeverZeroAndDoesNotRepeat) {
  std::set<uint64_t> seen;
  for (int i = 0; i < 1000; ++i) seen.insert(RandomId());
  EXPECT_EQ(seen.size(), 1000U);
  EXPECT_EQ(seen.count(0), 0U);
  EXPECT_EQ(RandomName("x-").size(), 26U);
}

}  // namespace
}  // namespace millrace
