#include "engine/tokenizer/chat_format.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <filesystem>
#include <string>

#include "base/file.h"

namespace millrace::engine {
namespace {

using ::testing::HasSubstr;

ChatMessage Turn(std::string role, std::string content) {
  ChatMessage message;
  message.role = std::move(role);
  message.content = std::move(content);
  return message;
}

ChatMessage Calling(std::string content, std::vector<ToolCall> calls) {
  ChatMessage message = Turn("assistant", std::move(content));
  message.tool_calls = std::move(calls);
  return message;
}

ChatMessage Reasoned(std::string reasoning, std::string content) {
  ChatMessage message = Turn("assistant", std::move(content));
  message.reasoning_content = std::move(reasoning);
  return message;
}

// The version 2 prompt of `messages`, without the opening system turn "detailed thinking off".
std::string V2Turns(std::vector<ChatMessage> messages) {
  ChatRequest request;
  request.messages = std::move(messages);
  request.add_generation_prompt = false;
  const auto text = RenderChat(ChatFormatKind::kLingV2, request);
  EXPECT_TRUE(text.ok()) << text.status();
  const std::string head = "<role>SYSTEM</role>detailed thinking off<|role_end|>";
  EXPECT_THAT(*text, ::testing::StartsWith(head));
  return text->substr(head.size());
}

TEST(ChatFormatV1, RendersRolesWithoutSeparators) {
  ChatRequest request;
  request.messages = {Turn("system", "S"), Turn("user", "Hi"), Turn("assistant", "Yo"), Turn("tool", "T")};
  EXPECT_EQ(*RenderChat(ChatFormatKind::kLingV1, request),
            "<role>SYSTEM</role>S<role>HUMAN</role>Hi<role>ASSISTANT</role>Yo<role>TOOL</"
            "role>T<role>ASSISTANT</role>");
  request.messages.resize(2);
  request.add_generation_prompt = false;
  EXPECT_EQ(*RenderChat(ChatFormatKind::kLingV1, request), "<role>SYSTEM</role>S<role>HUMAN</role>Hi");
}

TEST(ChatFormatV1, RefusesToolsThatItCannotShow) {
  ChatRequest request;
  request.messages = {Turn("user", "Hi"), Calling("", {{"", "f", OrderedJson::object()}})};
  EXPECT_THAT(std::string(Message(RenderChat(ChatFormatKind::kLingV1, request).status())),
              HasSubstr("messages[1].tool_calls"));
  request.messages.resize(1);
  request.tools = {OrderedJson::object()};
  EXPECT_THAT(std::string(Message(RenderChat(ChatFormatKind::kLingV1, request).status())),
              HasSubstr("tools"));
}

TEST(ChatFormatV2, OpensWithTheSystemTurn) {
  ChatRequest request;
  request.messages = {Turn("system", "SYS"), Turn("user", "Hi")};
  EXPECT_EQ(*RenderChat(ChatFormatKind::kLingV2, request),
            "<role>SYSTEM</role>SYS\ndetailed thinking off<|role_end|><role>HUMAN</role>Hi<|role_end|>"
            "<role>ASSISTANT</role>");
  request.messages.erase(request.messages.begin());
  request.thinking = true;
  EXPECT_EQ(*RenderChat(ChatFormatKind::kLingV2, request),
            "<role>SYSTEM</role>detailed thinking "
            "on<|role_end|><role>HUMAN</role>Hi<|role_end|><role>ASSISTANT</role>");
}

TEST(ChatFormatV2, ListsToolsWithKeysInTheClientsOrder) {
  ChatRequest request;
  request.messages = {Turn("system", "SYS"), Turn("user", "Hi")};
  request.tools = {*ParseOrderedJson(R"({"type":"function","function":{"name":"f","a":1.0}})"),
                   OrderedJson::object()};
  request.add_generation_prompt = false;
  EXPECT_EQ(
      *RenderChat(ChatFormatKind::kLingV2, request),
      "<role>SYSTEM</role>SYS\n# Tools\n\nYou may call one or more functions to assist with the user "
      "query.\n\n"
      "You are provided with function signatures within <tools></tools> XML tags:\n<tools>\n"
      "{\"type\": \"function\", \"function\": {\"name\": \"f\", \"a\": 1.0}}\n{}\n</tools>\n\n"
      "For each function call, return a json object with function name and arguments within "
      "<tool_call></tool_call> XML tags:\n<tool_call>\n{\"name\": <function-name>, \"arguments\": "
      "<args-json-object>}\n</tool_call>\ndetailed thinking off<|role_end|><role>HUMAN</role>Hi<|role_end|>");
}

TEST(ChatFormatV2, RendersToolCallsAndSharesOneTurnBetweenResults) {
  const OrderedJson arguments = *ParseOrderedJson(R"({"z":"é","a":[1,null]})");
  EXPECT_EQ(
      V2Turns({Turn("user", "q"), Calling("", {{"1", "f", arguments}, {"2", "g", "{\"raw\":1}"}}),
               Turn("tool", "r1"), Turn("tool", "r2"), Turn("system", "late"), Turn("tool", "r3")}),
      "<role>HUMAN</role>q<|role_end|><role>ASSISTANT</role>"
      "<tool_call>\n{\"name\": \"f\", \"arguments\": {\"z\": \"é\", \"a\": [1, null]}}\n</tool_call>\n"
      "<tool_call>\n{\"name\": \"g\", \"arguments\": {\"raw\":1}}\n</tool_call><|role_end|>"
      "<role>OBSERVATION</role>\n<tool_response>\nr1\n</tool_response>\n<tool_response>\nr2\n</tool_response>"
      "<|role_end|><role>SYSTEM</role>late<|role_end|>"
      "<role>OBSERVATION</role>\n<tool_response>\nr3\n</tool_response><|role_end|>");
  EXPECT_EQ(V2Turns({Turn("user", "q"), Calling("c", {{"", "f", OrderedJson::object()}})}),
            "<role>HUMAN</role>q<|role_end|><role>ASSISTANT</role>c\n"
            "<tool_call>\n{\"name\": \"f\", \"arguments\": {}}\n</tool_call><|role_end|>");
}

TEST(ChatFormatV2, KeepsReasoningOnlyAfterTheLastQuery) {
  const std::string kept = "<role>ASSISTANT</role>\n<think>\nwhy\n</think>\n\nso<|role_end|>";
  const std::string dropped = "<role>ASSISTANT</role>so<|role_end|>";
  const std::string query = "<role>HUMAN</role>q<|role_end|>";
  const auto user = Turn("user", "q");
  for (const ChatMessage& answer :
       {Reasoned("\nwhy\n", "\n\nso"), Turn("assistant", "<think>\nwhy\n</think>\n\nso"),
        Turn("assistant", "why\n</think>so"),
        Turn("assistant", "<think>not this<think>why</think>nor this</think>so")}) {
    EXPECT_EQ(V2Turns({user, answer}), query + kept) << answer.content;
  }
  for (const ChatMessage& answer :
       {Reasoned("why", "so"), Turn("assistant", "<think>\nwhy\n</think>\n\nso")}) {
    EXPECT_EQ(V2Turns({user, answer, user}), query + dropped + query);
  }
  // A user message that wholly is a tool response is not a query.
  EXPECT_EQ(V2Turns({user, Reasoned("why", "so"), Turn("user", "<tool_response>r</tool_response>")}),
            query + kept + "<role>HUMAN</role><tool_response>r</tool_response><|role_end|>");
  // Given reasoning, even empty, leaves the content alone.
  EXPECT_EQ(V2Turns({user, Reasoned("", "a</think>b")}),
            query + "<role>ASSISTANT</role>a</think>b<|role_end|>");
  // Without any query the last message takes its place.
  EXPECT_EQ(V2Turns({Reasoned("why", "so")}), dropped);
}

TEST(ChatFormat, RefusesByName) {
  ChatRequest request;
  for (const auto kind : {ChatFormatKind::kLingV1, ChatFormatKind::kLingV2}) {
    request.messages.clear();
    EXPECT_TRUE(absl::IsInvalidArgument(RenderChat(kind, request).status()));
    request.messages = {Turn("user", "a"), Turn("developer", "b")};
    const auto text = RenderChat(kind, request);
    EXPECT_TRUE(absl::IsInvalidArgument(text.status()));
    EXPECT_THAT(std::string(Message(text.status())), HasSubstr("messages[1].role: 'developer'"));
  }
}

TEST(PythonJson, WritesWhatPythonWrites) {
  const std::pair<const char*, const char*> cases[] = {
      {R"({"b":1,"a":[true,false,null],"c":{}})", R"({"b": 1, "a": [true, false, null], "c": {}})"},
      {R"("\u0001\b\f\n\r\t\"\\\/\u007f\u00e9\u2028<&>")",
       "\"\\u0001\\b\\f\\n\\r\\t\\\"\\\\/\x7Fé\u2028<&>\""},
      {"[]", "[]"},
      {"18446744073709551615", "18446744073709551615"},
      {"-9223372036854775808", "-9223372036854775808"},
      {"-0", "0"},
      {"-0.0", "-0.0"},
      {"1.0", "1.0"},
      {"1e2", "100.0"},
      {"0.1", "0.1"},
      {"123456.789", "123456.789"},
      {"0.0001", "0.0001"},
      {"0.00001", "1e-05"},
      {"9999999999999998.0", "9999999999999998.0"},
      {"1e16", "1e+16"},
      {"1.5e300", "1.5e+300"},
      {"5e-324", "5e-324"},
  };
  for (const auto& [json, expected] : cases) {
    const auto value = ParseOrderedJson(json);
    ASSERT_TRUE(value.ok()) << json;
    EXPECT_EQ(PythonJson(*value), expected);
  }
}

class DetectChatFormatTest : public ::testing::Test {
 protected:
  DetectChatFormatTest()
      : directory_(::testing::TempDir() + "chat_format_test_" +
                   ::testing::UnitTest::GetInstance()->current_test_info()->name()) {
    std::filesystem::create_directories(directory_);
  }
  ~DetectChatFormatTest() override { std::filesystem::remove_all(directory_); }
  StatusOr<ChatFormatKind> Detect(const std::string& config, bool is_v2) {
    EXPECT_TRUE(WriteFileAtomically(directory_ + "/tokenizer_config.json", config).ok());
    return DetectChatFormat(directory_, is_v2);
  }
  std::string directory_;
};

TEST_F(DetectChatFormatTest, FollowsTheTemplateBeforeTheArchitecture) {
  EXPECT_EQ(*DetectChatFormat(directory_, true), ChatFormatKind::kLingV2);
  EXPECT_EQ(*DetectChatFormat(directory_, false), ChatFormatKind::kLingV1);
  EXPECT_EQ(*Detect("{}", true), ChatFormatKind::kLingV2);
  EXPECT_EQ(*Detect(R"({"chat_template":"<role>HUMAN</role>"})", true), ChatFormatKind::kLingV1);
  EXPECT_EQ(*Detect(R"({"chat_template":"<role>HUMAN</role>x<|role_end|>"})", false),
            ChatFormatKind::kLingV2);
  EXPECT_EQ(*Detect(R"({"chat_template":[{"name":"tool_use","template":"<role>"},
                        {"name":"default","template":"detailed thinking "}]})",
                    false),
            ChatFormatKind::kLingV2);
  ASSERT_TRUE(WriteFileAtomically(directory_ + "/chat_template.jinja", "<role>").ok());
  EXPECT_EQ(*DetectChatFormat(directory_, true), ChatFormatKind::kLingV1);
}

TEST_F(DetectChatFormatTest, RefusesWhatItDoesNotKnow) {
  EXPECT_EQ(Detect(R"({"chat_template":"<|im_start|>"})", true).status().code(),
            absl::StatusCode::kUnimplemented);
  EXPECT_TRUE(absl::IsInvalidArgument(Detect(R"({"chat_template":7})", true).status()));
  EXPECT_TRUE(absl::IsInvalidArgument(Detect(R"({"chat_template":[{"name":"x"}]})", true).status()));
  EXPECT_TRUE(absl::IsInvalidArgument(Detect("{", true).status()));
}

}  // namespace
}  // namespace millrace::engine
