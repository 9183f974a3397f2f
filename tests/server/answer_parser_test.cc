#include "server/gateway/answer_parser.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <string>
#include <vector>

#include "base/random.h"

namespace millrace::server {
namespace {

struct Parsed {
  std::string reasoning;
  std::string content;
  std::vector<std::string> calls;  // "name arguments"
  bool operator==(const Parsed&) const = default;
};

std::ostream& operator<<(std::ostream& out, const Parsed& parsed) {
  out << "reasoning '" << parsed.reasoning << "' content '" << parsed.content << "'";
  for (const std::string& call : parsed.calls) out << " call '" << call << "'";
  return out;
}

void Add(const AnswerDelta& delta, Parsed* parsed) {
  parsed->reasoning += delta.reasoning;
  parsed->content += delta.content;
  for (const ToolCallDelta& piece : delta.tool_calls) {
    const auto index = static_cast<size_t>(piece.index);
    if (!piece.name.empty()) {
      EXPECT_EQ(index, parsed->calls.size()) << "indices count up";
      EXPECT_TRUE(piece.id.starts_with("call_"));
      parsed->calls.push_back(piece.name + " ");
    } else {
      EXPECT_TRUE(piece.id.empty());
    }
    ASSERT_LT(index, parsed->calls.size()) << "the name comes first";
    parsed->calls[index] += piece.arguments;
  }
}

// Every way to cut the text into pieces of one length gives the same parts, and nothing of the markup shows
// on the way.
Parsed Parse(const std::string& text, const AnswerParserOptions& options) {
  Parsed whole;
  for (size_t step = text.size() + 1; step-- > 1;) {
    AnswerParser parser(options);
    Parsed parsed;
    for (size_t at = 0; at < text.size(); at += step) Add(parser.Push(text.substr(at, step)), &parsed);
    Add(parser.Finish(), &parsed);
    if (step == text.size()) whole = parsed;
    EXPECT_EQ(parsed, whole) << "in pieces of " << step << ": " << text;
    EXPECT_EQ(parser.num_tool_calls(), static_cast<int32_t>(parsed.calls.size()));
  }
  return whole;
}

constexpr AnswerParserOptions kTools{.tools = true};
constexpr AnswerParserOptions kThinking{.thinking = true};
constexpr const char* kCall = "<tool_call>\n{\"name\": \"f\", \"arguments\": {\"a\": 1}}\n</tool_call>";

TEST(AnswerParserTest, SplitsToolCalls) {
  const std::string call = kCall;
  const struct {
    std::string text;
    Parsed expected;
  } cases[] = {
      {"", {}},
      {"plain\n", {"", "plain\n", {}}},
      {call, {"", "", {"f {\"a\": 1}"}}},
      {"Let me see.\n" + call, {"", "Let me see.", {"f {\"a\": 1}"}}},
      {call + "\n" + call, {"", "", {"f {\"a\": 1}", "f {\"a\": 1}"}}},
      {call + call + "\nDone.", {"", "Done.", {"f {\"a\": 1}", "f {\"a\": 1}"}}},
      {"<tool_call>{\"arguments\":{\"a\":\"}\\\"</tool_call>\"},\"name\":\"g\"}</tool_call>",
       {"", "", {"g {\"a\":\"}\\\"</tool_call>\"}"}}},
      {"<tool_call>{\"name\":\"g\"}</tool_call>", {"", "", {"g {}"}}},
      {"<tool_call>{\"id\": 7, \"name\":\"g\", \"strict\": true, \"parameters\": {}}</tool_call>",
       {"", "", {"g {}"}}},
      {"<tool_call>{\"name\":\"g\",\"arguments\":\"{\\\"a\\\": 2}\"}</tool_call>",
       {"", "", {"g {\"a\": 2}"}}},
      {"<tool_call>{\"name\":\"g\",\"arguments\":{\"l\":[1,{\"m\":[]}]}}",
       {"", "", {"g {\"l\":[1,{\"m\":[]}]}"}}},
      // Cut short by max_tokens: what is known.
      {"<tool_call>\n{\"name\": \"f\", \"arguments\": {\"a\": ", {"", "", {"f {\"a\": "}}},
      {"<tool_call>\n{\"name\": \"f", {"", "{\"name\": \"f", {}}},
      // No calls: content without the markup.
      {"<tool_call>sorry</tool_call> ok", {"", "sorry ok", {}}},
      {"<tool_call>\n[1]\n</tool_call>", {"", "[1]", {}}},
      {"<tool_call>\n{\"name\": 7}\n</tool_call>" + call, {"", "{\"name\": 7}", {"f {\"a\": 1}"}}},
      {"a < b and <tool is no tag", {"", "a < b and <tool is no tag", {}}},
      {"ends with <tool_ca", {"", "ends with <tool_ca", {}}},
  };
  for (const auto& c : cases) EXPECT_EQ(Parse(c.text, kTools), c.expected) << c.text;
}

TEST(AnswerParserTest, LeavesMarkupAloneWithoutTools) {
  EXPECT_EQ(Parse(kCall, {}), (Parsed{"", kCall, {}}));
}

TEST(AnswerParserTest, SplitsReasoning) {
  const struct {
    std::string text;
    AnswerParserOptions options;
    Parsed expected;
  } cases[] = {
      {"\n<think>\nhm\n</think>\n\nyes", {}, {"hm", "yes", {}}},
      {"<think>a\n\nb</think>c", {}, {"a\n\nb", "c", {}}},
      {"<think></think>c", {}, {"", "c", {}}},
      {"<think>\n\n</think>\n\nc\n", {}, {"", "c\n", {}}},
      {"<think>cut", {}, {"cut", "", {}}},
      {"not <think>first</think>", {}, {"", "not <think>first</think>", {}}},
      {"\n <thin ice", {}, {"", "\n <thin ice", {}}},
      {"<think>a</think>b", {.split_reasoning = false}, {"", "<think>a</think>b", {}}},
      {"the opener is missing\n</think>\n\nyes", kThinking, {"the opener is missing", "yes", {}}},
      {"<think>it is there</think>yes", kThinking, {"it is there", "yes", {}}},
      {"<think>a < b </th</think>yes", kThinking, {"a < b </th", "yes", {}}},
      {std::string("<think>t</think>\nfirst\n") + kCall, kTools, {"t", "first", {"f {\"a\": 1}"}}},
      {std::string("<think>") + kCall + "</think>ok", kTools, {kCall, "ok", {}}},
  };
  for (const auto& c : cases) EXPECT_EQ(Parse(c.text, c.options), c.expected) << c.text;
}

TEST(AnswerParserTest, StreamsArgumentsAsTheyCome) {
  AnswerParser parser(kTools);
  EXPECT_TRUE(parser.Push("<tool_call>\n{\"name\": \"weather\"").tool_calls.size() == 1);
  const AnswerDelta delta = parser.Push(", \"arguments\": {\"city\": \"Ul");
  std::string arguments;
  for (const ToolCallDelta& piece : delta.tool_calls) arguments += piece.arguments;
  EXPECT_EQ(arguments, "{\"city\": \"Ul") << "before the call ends";
}

TEST(AnswerParserTest, IsSatisfiedAfterOneCallWhenAskedFor) {
  AnswerParser parser({.tools = true, .single_tool_call = true});
  parser.Push(std::string(kCall).substr(0, 30));
  EXPECT_FALSE(parser.satisfied());
  parser.Push(std::string(kCall).substr(30));
  EXPECT_TRUE(parser.satisfied());
}

// Markup in random order: no piece of a tag in the content that is not there literally, no crash, and the
// same parts however it is cut.
TEST(AnswerParserTest, SurvivesAnything) {
  const std::vector<std::string> words = {"<tool_call>",
                                          "</tool_call>",
                                          "<think>",
                                          "</think>",
                                          "{",
                                          "}",
                                          "\"",
                                          "\\",
                                          "name",
                                          ":",
                                          ",",
                                          " ",
                                          "\n",
                                          "arguments",
                                          "[",
                                          "]",
                                          "x",
                                          "\"name\": \"f\"",
                                          "{\"name\": \"f\", \"arguments\": {"};
  for (uint64_t seed = 0; seed < 300; ++seed) {
    std::string text;
    for (uint64_t i = 0; i < 12; ++i) {
      const double draw = UniformAt(seed, i) * static_cast<double>(words.size());
      text += words[static_cast<size_t>(draw)];
    }
    const Parsed parsed = Parse(text, {.thinking = seed % 2 == 0, .tools = true});
    EXPECT_EQ(parsed.content.find("<tool_call>"), std::string::npos) << "seed " << seed << ": " << text;
  }
}

}  // namespace
}  // namespace millrace::server
