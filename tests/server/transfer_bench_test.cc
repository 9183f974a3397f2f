// What transfer-bench measures with: percentiles, and bytes that say where they belong.
#include <gtest/gtest.h>

#include <algorithm>

#include "base/latency_histogram.h"
#include "base/random.h"
#include "server/cli/transfer_bench_control.h"
#include "server/cli/transfer_bench_pattern.h"

namespace millrace::server {
namespace {

TEST(LatencyHistogram, PercentilesAreWithinOnePercentOfTheSortedValues) {
  Random random(3);
  LatencyHistogram histogram;
  LatencyHistogram other;
  std::vector<uint64_t> values;
  for (int i = 0; i < 20'000; ++i) {
    const uint64_t value = random.Next() >> (20 + random.Below(44));  // over all magnitudes
    values.push_back(value);
    (i % 2 == 0 ? histogram : other).Record(static_cast<int64_t>(value));
  }
  histogram.Merge(other);
  std::sort(values.begin(), values.end());
  ASSERT_EQ(histogram.count(), values.size());
  for (const double percent : {0.01, 10.0, 50.0, 90.0, 99.0, 99.9, 99.99}) {
    const auto index = static_cast<size_t>(static_cast<double>(values.size()) * percent / 100 + 0.5) - 1;
    const auto exact = static_cast<double>(values[index]);
    const auto found = static_cast<double>(histogram.Percentile(percent));
    EXPECT_GE(found, exact) << percent;
    EXPECT_LE(found, exact * 1.01 + 1) << percent;
  }
  EXPECT_EQ(histogram.Percentile(100), values.back());
}

TEST(LatencyHistogram, OfNothingIsZero) {
  EXPECT_EQ(LatencyHistogram().Percentile(99), 0U);
  LatencyHistogram one;
  one.Record(-5);  // a clock that went back
  EXPECT_EQ(one.Percentile(50), 0U);
  EXPECT_EQ(one.count(), 1U);
}

TEST(BenchPattern, SeesEveryKindOfWrongByte) {
  std::vector<std::byte> bytes(4096);
  const BenchPattern pattern(7, 1);
  pattern.Fill(bytes, 8192);
  EXPECT_EQ(pattern.CountWrong(bytes, 8192), 0U);
  EXPECT_EQ(pattern.CountWrong(bytes, 8200), bytes.size()) << "another place";
  EXPECT_EQ(BenchPattern(7, 2).CountWrong(bytes, 8192), bytes.size()) << "another round";
  EXPECT_EQ(BenchPattern(8, 1).CountWrong(bytes, 8192), bytes.size()) << "another initiator";
  for (const size_t at : {size_t{0}, size_t{2047}, size_t{4095}}) {
    bytes[at] ^= std::byte{1};
    EXPECT_EQ(pattern.CountWrong(bytes, 8192), 8U) << "one bit at " << at;
    bytes[at] ^= std::byte{1};
  }
}

TEST(BenchControl, HexGoesThereAndBack) {
  std::string all;
  for (int i = 0; i < 256; ++i) all.push_back(static_cast<char>(i));
  const auto back = FromHex(ToHex(all));
  ASSERT_TRUE(back.ok());
  EXPECT_EQ(*back, all);
  for (const char* wrong : {"0", "0g", "-1", "+1", " 1"}) EXPECT_FALSE(FromHex(wrong).ok()) << wrong;
}

}  // namespace
}  // namespace millrace::server
