#include "base/log.h"

#include <gtest/gtest.h>

#include "base/json.h"

namespace millrace {
namespace {

TEST(Log, RefusesUnknownOptions) {
  EXPECT_EQ(ConfigureLog({"loud", "text"}).code(), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(ConfigureLog({"info", "xml"}).code(), absl::StatusCode::kInvalidArgument);
}

TEST(Log, JsonLinesAreJsonWhateverTheMessage) {
  ASSERT_TRUE(ConfigureLog({"info", "json"}).ok());
  testing::internal::CaptureStderr();
  LogWarning("quote \" backslash \\ newline \n {}", "end");
  const std::string line = testing::internal::GetCapturedStderr();
  const auto parsed = ParseJson(line);
  ASSERT_TRUE(parsed.ok()) << line;
  EXPECT_EQ((*parsed)["message"], "quote \" backslash \\ newline \n end");
  EXPECT_EQ((*parsed)["level"], "warning");
  ASSERT_TRUE(ConfigureLog({}).ok());
}

}  // namespace
}  // namespace millrace
