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

// The wide path begins at 256 bytes and has steps of 256, 64 and 1: every length around them, against the
// definition.
TEST(Crc32c, EqualsTheDefinitionForEveryLength) {
  std::string text;
  uint32_t crc = ~uint32_t{0};
  for (size_t size = 0; size < 1500; ++size) {
    EXPECT_EQ(Crc32c(AsBytes(text)), ~crc) << size;
    EXPECT_EQ(Crc32c(AsBytes(text), 0x1234),
              Crc32c(AsBytes(text.substr(7 < size ? 7 : size)), Crc32c(AsBytes(text.substr(0, 7)), 0x1234)));
    const auto next = static_cast<unsigned char>(size * 31 + (size >> 3));
    text.push_back(static_cast<char>(next));
    crc ^= next;
    for (int bit = 0; bit < 8; ++bit) crc = (crc & 1U) != 0 ? (crc >> 1) ^ 0x82f63b78U : crc >> 1;
  }
}

TEST(Xxh3, DependsOnContentAndSeed) {
  EXPECT_NE(Xxh3(AsBytes("a")), Xxh3(AsBytes("b")));
  EXPECT_NE(Xxh3(AsBytes("a"), 1), Xxh3(AsBytes("a"), 2));
  EXPECT_EQ(Xxh3Hex(AsBytes("")), "99aa06d3014798d86001c324468d497f");  // XXH3-128 of nothing
}

}  // namespace
}  // namespace millrace
