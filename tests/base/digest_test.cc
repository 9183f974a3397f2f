#include "base/digest.h"

#include <gtest/gtest.h>

namespace millrace {
namespace {

TEST(Crc32c, EqualsTheCheckValueOfTheStandard) {
  EXPECT_EQ(Crc32c(AsBytes("123456789")), 0xe3069283U);  // RFC 3720, appendix B.4's polynomial
  EXPECT_EQ(Crc32c({}), 0U);
  EXPECT_EQ(Crc32c(AsBytes(std::string(32, '\0'))), 0x8a9136aaU);
}

TEST(Crc32c, ChainsOverAnySplit) {
  const std::string text = "the quick brown fox jumps over the lazy dog, twice or thrice";
  const uint32_t whole = Crc32c(AsBytes(text));
  for (size_t cut = 0; cut <= text.size(); ++cut) {
    EXPECT_EQ(Crc32c(AsBytes(text.substr(cut)), Crc32c(AsBytes(text.substr(0, cut)))), whole) << cut;
  }
}

TEST(Xxh3, DependsOnContentAndSeed) {
  EXPECT_NE(Xxh3(AsBytes("a")), Xxh3(AsBytes("b")));
  EXPECT_NE(Xxh3(AsBytes("a"), 1), Xxh3(AsBytes("a"), 2));
  EXPECT_EQ(Xxh3Hex(AsBytes("")), "99aa06d3014798d86001c324468d497f");  // XXH3-128 of nothing
}

}  // namespace
}  // namespace millrace
