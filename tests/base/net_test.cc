#include "base/net.h"

#include <gtest/gtest.h>

namespace millrace {
namespace {

TEST(HostPort, ParsesAndPrints) {
  EXPECT_EQ(ParseHostPort("10.0.0.1:80")->ToString(), "10.0.0.1:80");
  EXPECT_EQ(ParseHostPort("[::1]:80")->host, "::1");
  EXPECT_EQ(ParseHostPort("[::1]:80")->ToString(), "[::1]:80");
  EXPECT_EQ(ParseHostPort(":8080")->ToString(), "127.0.0.1:8080");
  EXPECT_EQ(ParseHostPort("name", "", 7)->ToString(), "name:7");
}

TEST(HostPort, RefusesWithTheReason) {
  for (const char* bad :
       {"", "host", "host:", "host:70000", "host:8x", "::1", "::1:80", "[::1", "[::1]80", "host:-1"}) {
    EXPECT_EQ(ParseHostPort(bad).status().code(), absl::StatusCode::kInvalidArgument) << bad;
  }
}

TEST(Resolve, GivesNumericAddresses) {
  const auto found = Resolve({"127.0.0.1", 9});
  ASSERT_TRUE(found.ok());
  EXPECT_EQ(found->at(0).ToString(), "127.0.0.1:9");
  EXPECT_EQ(Resolve({"no-such-name.invalid", 9}).status().code(), absl::StatusCode::kUnavailable);
}

TEST(IsUtf8, KnowsEveryKindOfBadByte) {
  for (const char* good :
       {"", "plain", "\xc3\xa9", "\xe4\xb8\xad", "\xf0\x9f\x98\x80", "\xed\x9f\xbf", "\xf4\x8f\xbf\xbf"}) {
    EXPECT_TRUE(IsUtf8(good)) << good;
  }
  for (const char* bad : {"\x80", "\xc0\x80", "\xc1\xbf", "\xe0\x80\x80", "\xed\xa0\x80", "\xf0\x80\x80\x80",
                          "\xf4\x90\x80\x80", "\xf5\x80\x80\x80", "\xc3", "\xe4\xb8", "a\xff"}) {
    EXPECT_FALSE(IsUtf8(bad));
  }
}

}  // namespace
}  // namespace millrace
