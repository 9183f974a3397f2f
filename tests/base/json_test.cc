#include "base/json.h"

#include <gtest/gtest.h>

namespace millrace {
namespace {

TEST(Json, RefusesWhatIsNotJson) {
  for (const char* bad : {"", "{", "{\"a\":}", "[1,]", "nul", "{\"a\":1} x", "\"\xff\"", "'a'"}) {
    EXPECT_EQ(ParseJson(bad).status().code(), absl::StatusCode::kInvalidArgument) << bad;
  }
}

TEST(Json, BoundsNesting) {
  EXPECT_TRUE(ParseJson(std::string(64, '[') + std::string(64, ']')).ok());
  EXPECT_FALSE(ParseJson(std::string(65, '[') + std::string(65, ']')).ok());
  EXPECT_FALSE(ParseJson(std::string(1'000'000, '[')).ok());
  EXPECT_TRUE(ParseJson("\"" + std::string(100, '[') + "\"").ok()) << "brackets inside a string do not nest";
}

TEST(Json, AccessorsNameTheField) {
  const Json object =
      *ParseJson(R"({"b":true,"i":7,"f":1.5,"whole":3.0,"s":"x","n":null,"big":18446744073709551615})");
  EXPECT_EQ(**GetBool(object, "b"), true);
  EXPECT_EQ(**GetInt(object, "i"), 7);
  EXPECT_EQ(**GetInt(object, "whole"), 3);
  EXPECT_EQ(**GetNumber(object, "f"), 1.5);
  EXPECT_EQ(**GetString(object, "s"), "x");
  EXPECT_FALSE(GetInt(object, "n")->has_value());
  EXPECT_FALSE(GetInt(object, "missing")->has_value());
  for (const char* key : {"b", "f", "s", "big"}) {
    const auto status = GetInt(object, key).status();
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
    EXPECT_NE(Message(status).find(key), std::string_view::npos);
  }
  EXPECT_FALSE(GetBool(object, "i").ok());
  EXPECT_FALSE(GetString(object, "i").ok());
  EXPECT_FALSE(GetNumber(object, "s").ok());
}

TEST(Json, OrderedKeepsTheOrderOfKeys) {
  EXPECT_EQ(DumpJson(*ParseOrderedJson(R"({"z":1,"a":{"y":2,"b":3}})")), R"({"z":1,"a":{"y":2,"b":3}})");
}

}  // namespace
}  // namespace millrace
