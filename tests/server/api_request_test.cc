#include "server/gateway/api_request.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <set>
#include <string>
#include <vector>

#include "tests/server/small_tokenizer.h"

namespace millrace::server {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;

constexpr const char* kChatHead = R"("messages":[{"role":"user","content":"hi"}])";

class ApiRequestTest : public ::testing::Test {
 protected:
  ApiResult<ApiRequest> Chat(const std::string& body) {
    return ParseApiRequest(Endpoint::kChat, body, model_, *tokenizer_);
  }
  ApiResult<ApiRequest> ChatWith(const std::string& fields) {
    return Chat(std::string("{") + kChatHead + "," + fields + "}");
  }
  ApiResult<ApiRequest> Completion(const std::string& body) {
    return ParseApiRequest(Endpoint::kCompletions, body, model_, *tokenizer_);
  }

  SmallTokenizer tokenizer_;
  const ModelInfo model_{"tiny", 512, 1700000000, engine::ChatFormatKind::kLingV2};
};

struct Refused {
  std::string body;
  std::string param;  // "" for none
};

void ExpectRefused(const ApiResult<ApiRequest>& result, const Refused& expected) {
  ASSERT_FALSE(result.ok()) << expected.body;
  EXPECT_EQ(result.error().http_status, 400) << expected.body;
  EXPECT_EQ(result.error().type, "invalid_request_error") << expected.body;
  EXPECT_EQ(result.error().code.value_or("none"), "invalid_value") << expected.body;
  EXPECT_EQ(result.error().param.value_or(""), expected.param)
      << expected.body << ": " << result.error().message;
  EXPECT_FALSE(result.error().message.empty()) << expected.body;
}

TEST_F(ApiRequestTest, RefusesChatBodiesByField) {
  const Refused cases[] = {
      {"", ""},
      {"{", ""},
      {"[]", ""},
      {"null", ""},
      {"\"text\"", ""},
      {"{\"messages\":[{\"role\":\"user\",\"content\":\"\xFF\"}]}", ""},
      {"{}", "messages"},
      {R"({"model":7,"messages":[{"role":"user","content":"a"}]})", "model"},
      {R"({"messages":null})", "messages"},
      {R"({"messages":"hi"})", "messages"},
      {R"({"messages":[]})", "messages"},
      {R"({"messages":[123]})", "messages[0]"},
      {R"({"messages":[{}]})", "messages[0].role"},
      {R"({"messages":[{"role":1,"content":"a"}]})", "messages[0].role"},
      {R"({"messages":[{"role":"narrator","content":"a"}]})", "messages[0].role"},
      {R"({"messages":[{"role":"user"}]})", "messages[0].content"},
      {R"({"messages":[{"role":"user","content":null}]})", "messages[0].content"},
      {R"({"messages":[{"role":"user","content":5}]})", "messages[0].content"},
      {R"({"messages":[{"role":"user","content":[5]}]})", "messages[0].content[0]"},
      {R"({"messages":[{"role":"user","content":[{"type":"image_url"}]}]})", "messages[0].content[0].type"},
      {R"({"messages":[{"role":"user","content":[{"type":"text"}]}]})", "messages[0].content[0].text"},
      {R"({"messages":[{"role":"user","content":"a"},{"role":"assistant","content":"b"},{"role":"assistant","content":"c"}]})",
       "messages"},
      {R"({"messages":[{"role":"assistant","content":null,"tool_calls":[]}]})", "messages[0].tool_calls"},
      {R"({"messages":[{"role":"assistant","content":null,"tool_calls":[{}]}]})",
       "messages[0].tool_calls[0]"},
  };
  for (const Refused& c : cases) ExpectRefused(Chat(c.body), c);
}

TEST_F(ApiRequestTest, RefusesChatFieldsByName) {
  const Refused cases[] = {
      {R"("temperature":"hot")", "temperature"},
      {R"("temperature":-0.1)", "temperature"},
      {R"("temperature":2.1)", "temperature"},
      {R"("top_p":0)", "top_p"},
      {R"("top_p":1.5)", "top_p"},
      {R"("top_k":-2)", "top_k"},
      {R"("top_k":1.5)", "top_k"},
      {R"("min_p":2)", "min_p"},
      {R"("repetition_penalty":0)", "repetition_penalty"},
      {R"("presence_penalty":3)", "presence_penalty"},
      {R"("frequency_penalty":-3)", "frequency_penalty"},
      {R"("n":17)", "n"},
      {R"("n":0)", "n"},
      {R"("max_tokens":0)", "max_tokens"},
      {R"("max_tokens":"many")", "max_tokens"},
      {R"("max_completion_tokens":-1)", "max_completion_tokens"},
      {R"("max_tokens":4,"min_tokens":5)", "min_tokens"},
      {R"("seed":"a")", "seed"},
      {R"("seed":1.5)", "seed"},
      {R"("stop":7)", "stop"},
      {R"("stop":[""])", "stop"},
      {R"("stop":["a",1])", "stop"},
      {R"("stop":["1","2","3","4","5","6","7","8","9","10","11","12","13","14","15","16","17"])", "stop"},
      {R"("stop_token_ids":[262])", "stop_token_ids"},
      {R"("stop_token_ids":"1")", "stop_token_ids"},
      {R"("logit_bias":[])", "logit_bias"},
      {R"("logit_bias":{"262":1})", "logit_bias"},
      {R"("logit_bias":{"x":1})", "logit_bias"},
      {R"("logit_bias":{"1":101})", "logit_bias"},
      {R"("logprobs":1)", "logprobs"},
      {R"("top_logprobs":2)", "top_logprobs"},
      {R"("logprobs":true,"top_logprobs":21)", "top_logprobs"},
      {R"("stream":"yes")", "stream"},
      {R"("stream_options":{"include_usage":true})", "stream_options"},
      {R"("stream":true,"stream_options":[])", "stream_options"},
      {R"("stream":true,"stream_options":{"include_usage":1})", "stream_options.include_usage"},
      {R"("ignore_eos":1)", "ignore_eos"},
      {R"("skip_special_tokens":0)", "skip_special_tokens"},
      {R"("priority":1001)", "priority"},
      {R"("cache_salt":7)", "cache_salt"},
      {R"("timeout":0)", "timeout"},
      {R"("tools":[])", "tools"},
      {R"("tools":[{"type":"function"}])", "tools[0]"},
      {R"("tool_choice":"required")", "tool_choice"},
      {R"("tools":[{"type":"function","function":{"name":"f"}}],"tool_choice":"maybe")", "tool_choice"},
      {R"("tools":[{"type":"function","function":{"name":"f"}}],"tool_choice":{"type":"function","function":{"name":"g"}})",
       "tool_choice"},
      {R"("chat_template_kwargs":{"colour":1})", "chat_template_kwargs.colour"},
      {R"("chat_template_kwargs":{"enable_thinking":1})", "chat_template_kwargs.enable_thinking"},
      {R"("response_format":{"type":"yaml"})", "response_format.type"},
      {R"("response_format":{"type":"json_schema"})", "response_format.json_schema"},
      {R"("response_format":{"type":"json_schema","json_schema":{"schema":{"not":{}}}})", "response_format"},
      {R"("response_format":{"type":"json_object"},"min_tokens":2)", "response_format"},
      {R"("response_format":{"type":"json_object"},"guided_regex":"a")", "guided_regex"},
      {R"("structured_outputs":{"regex":"("})", "structured_outputs.regex"},
      {R"("structured_outputs":{"structural_tag":"a"})", "structured_outputs.structural_tag"},
      {R"("response_format":"text")", "response_format"},
      {R"("functions":[])", "functions"},
      {R"("parallel_tool_calls":1)", "parallel_tool_calls"},
      {R"("reasoning_effort":"huge")", "reasoning_effort"},
      {R"("continue_final_message":true)", "continue_final_message"},
      {R"("modalities":["audio"])", "modalities"},
      {R"("verbosity":"low")", "verbosity"},
      {R"("store":true)", "store"},
      {R"("service_tier":"flex")", "service_tier"},
      {R"("metadata":{"a":1})", "metadata"},
      {R"("user":7)", "user"},
      {R"("request_id":"a b")", "request_id"},
      {R"("return_token_ids":1)", "return_token_ids"},
      {R"("web_search_options":{})", "web_search_options"},
      {R"("prediction":{})", "prediction"},
      {R"("best_of":2)", "best_of"},
      {R"("guided_json":7)", "guided_json"},
  };
  for (const Refused& c : cases) ExpectRefused(ChatWith(c.body), c);
}

TEST_F(ApiRequestTest, RefusesCompletionBodiesByField) {
  const Refused cases[] = {
      {"{}", "prompt"},
      {R"({"prompt":null})", "prompt"},
      {R"({"prompt":""})", "prompt"},
      {R"({"prompt":[]})", "prompt"},
      {R"({"prompt":5})", "prompt"},
      {R"({"prompt":["a",7]})", "prompt[1]"},
      {R"({"prompt":["a",""]})", "prompt[1]"},
      {R"({"prompt":"a","tools":[]})", "tools"},
      {R"({"prompt":["a","a","a","a","a","a","a","a","a"],"n":16})", "n"},
      {R"({"prompt":"a","truncate_prompt_tokens":0})", "truncate_prompt_tokens"},
      {R"({"prompt":[1,-1]})", "prompt"},
      {R"({"prompt":[262]})", "prompt"},
      {R"({"prompt":[18446744073709551615]})", "prompt"},
      {R"({"prompt":[1.5]})", "prompt"},
      {R"({"prompt":"a","suffix":"b"})", "suffix"},
      {R"({"prompt":"a","logprobs":21})", "logprobs"},
      {R"({"prompt":"a","logprobs":true})", "logprobs"},
      {R"({"prompt":"a","echo":"x"})", "echo"},
  };
  for (const Refused& c : cases) ExpectRefused(Completion(c.body), c);
}

TEST_F(ApiRequestTest, AnswersAnotherModelWith404) {
  const auto result = ChatWith(R"("model":"other")");
  ASSERT_FALSE(result.ok());
  EXPECT_EQ(result.error().http_status, 404);
  EXPECT_EQ(result.error().code.value_or(""), "model_not_found");
  EXPECT_EQ(result.error().param.value_or(""), "model");
  EXPECT_THAT(result.error().message, HasSubstr("other"));
}

TEST_F(ApiRequestTest, SaysBothNumbersWhenThePromptIsTooLong) {
  const std::string prompt(600, '!');
  for (const auto& result :
       {Completion("{\"prompt\":\"" + prompt + "\"}"), Completion(R"({"prompt":"abc","max_tokens":600})")}) {
    ASSERT_FALSE(result.ok());
    EXPECT_EQ(result.error().http_status, 400);
    EXPECT_EQ(result.error().code.value_or(""), "context_length_exceeded");
    EXPECT_THAT(result.error().message, HasSubstr("600"));
    EXPECT_THAT(result.error().message, HasSubstr("512"));
  }
}

TEST_F(ApiRequestTest, FillsInDefaults) {
  auto chat = Chat(std::string("{") + kChatHead + "}");
  ASSERT_TRUE(chat.ok()) << chat.error().message;
  EXPECT_THAT(chat->id, ::testing::StartsWith("chatcmpl-"));
  EXPECT_FLOAT_EQ(chat->sampling.temperature, 1);
  EXPECT_FLOAT_EQ(chat->sampling.top_p, 1);
  EXPECT_EQ(chat->sampling.num_logprobs, -1);
  EXPECT_EQ(chat->sampling.max_tokens, 512 - static_cast<int32_t>(chat->prompts[0].size()));
  EXPECT_FALSE(chat->stream);
  auto other = Chat(std::string("{") + kChatHead + "}");
  EXPECT_NE(chat->sampling.seed, other->sampling.seed) << "a request without a seed draws one";
  EXPECT_NE(chat->id, other->id);

  auto completion = Completion(R"({"prompt":"hello"})");
  ASSERT_TRUE(completion.ok()) << completion.error().message;
  EXPECT_EQ(completion->sampling.max_tokens, 16);
  EXPECT_THAT(completion->prompts, ElementsAre(ElementsAre(kHelloToken)));
}

TEST_F(ApiRequestTest, TakesEveryFormOfAPrompt) {
  for (const char* body :
       {R"({"prompt":"hello"})", R"({"prompt":["hello"]})", R"({"prompt":[260]})", R"({"prompt":[[260]]})"}) {
    auto request = Completion(body);
    ASSERT_TRUE(request.ok()) << body << ": " << request.error().message;
    EXPECT_THAT(request->prompts, ElementsAre(ElementsAre(kHelloToken))) << body;
  }
}

TEST_F(ApiRequestTest, ReadsEveryField) {
  auto request = ChatWith(
      R"("model":"tiny","temperature":0.5,"top_p":0.9,"top_k":40,"min_p":0.1,"repetition_penalty":1.1,)"
      R"("presence_penalty":0.2,"frequency_penalty":-0.3,"seed":-1,"max_completion_tokens":9,"max_tokens":4,"min_tokens":2,)"
      R"("stop":["a","bc"],"stop_token_ids":[3],"logit_bias":{"5":-100},"logprobs":true,"top_logprobs":3,"stream":true,)"
      R"("stream_options":{"include_usage":true,"continuous_usage_stats":true},"ignore_eos":true,)"
      R"("skip_special_tokens":false,"priority":-2,"cache_salt":"s","timeout":1.5,"user":"u","made_up":1)");
  ASSERT_TRUE(request.ok()) << request.error().message;
  EXPECT_FLOAT_EQ(request->sampling.temperature, 0.5F);
  EXPECT_FLOAT_EQ(request->sampling.top_p, 0.9F);
  EXPECT_EQ(request->sampling.top_k, 40);
  EXPECT_FLOAT_EQ(request->sampling.min_p, 0.1F);
  EXPECT_FLOAT_EQ(request->sampling.repetition_penalty, 1.1F);
  EXPECT_FLOAT_EQ(request->sampling.presence_penalty, 0.2F);
  EXPECT_FLOAT_EQ(request->sampling.frequency_penalty, -0.3F);
  EXPECT_EQ(request->sampling.seed, UINT64_MAX);
  EXPECT_EQ(request->sampling.max_tokens, 9);
  EXPECT_EQ(request->sampling.min_tokens, 2);
  EXPECT_THAT(request->stop, ElementsAre("a", "bc"));
  EXPECT_THAT(request->sampling.stop_token_ids, ElementsAre(3));
  EXPECT_THAT(request->sampling.logit_bias, ElementsAre(std::pair<int32_t, float>(5, -100)));
  EXPECT_EQ(request->sampling.num_logprobs, 3);
  EXPECT_TRUE(request->stream);
  EXPECT_TRUE(request->include_usage);
  EXPECT_TRUE(request->continuous_usage);
  EXPECT_TRUE(request->sampling.ignore_eos);
  EXPECT_FALSE(request->skip_special_tokens);
  EXPECT_EQ(request->priority, -2);
  EXPECT_EQ(request->cache_salt, "s");
  EXPECT_DOUBLE_EQ(request->timeout_seconds.value_or(0), 1.5);
  EXPECT_THAT(request->unknown_fields, ElementsAre("made_up"));
}

TEST_F(ApiRequestTest, TakesSeveralPromptsAndChoices) {
  auto request = Completion(R"({"prompt":["hello",[1,2]],"n":3,"seed":5})");
  ASSERT_TRUE(request.ok()) << request.error().message;
  EXPECT_EQ(request->num_choices(), 6);
  EXPECT_THAT(request->PromptOf(2), ElementsAre(kHelloToken));
  EXPECT_THAT(request->PromptOf(3), ElementsAre(1, 2));
  EXPECT_EQ(request->SamplingOf(0).seed, 5U) << "n = 1 and n > 1 begin alike";
  std::set<uint64_t> seeds;
  for (int32_t i = 0; i < 6; ++i) seeds.insert(request->SamplingOf(i).seed);
  EXPECT_EQ(seeds.size(), 6U);
}

TEST_F(ApiRequestTest, TakesValuesThatAskForNothing) {
  auto request = ChatWith(
      R"("modalities":["text"],"verbosity":"medium","store":false,"service_tier":"auto","best_of":1,)"
      R"("response_format":{"type":"text"},"metadata":{"a":"b"},"reasoning_effort":"none")");
  ASSERT_TRUE(request.ok()) << request.error().message;
  EXPECT_TRUE(request->unknown_fields.empty());
}

TEST_F(ApiRequestTest, TruncatesFromTheFront) {
  auto request = Completion(R"({"prompt":[1,2,3,4],"truncate_prompt_tokens":2})");
  ASSERT_TRUE(request.ok()) << request.error().message;
  EXPECT_THAT(request->prompts[0], ElementsAre(3, 4));
}

TEST_F(ApiRequestTest, ContinuesTheFinalMessage) {
  const std::string messages =
      R"("messages":[{"role":"user","content":"hi"},{"role":"assistant","content":"hello"}])";
  auto request = Chat("{" + messages + R"(,"continue_final_message":true})");
  ASSERT_TRUE(request.ok()) << request.error().message;
  EXPECT_EQ(request->prompts[0].back(), kHelloToken) << "the turn is not closed";
}

TEST_F(ApiRequestTest, ParsesToolCallsOnlyWhenToolsAreOffered) {
  const std::string tools = R"("tools":[{"type":"function","function":{"name":"f"}}])";
  const ModelInfo roomy{"tiny", 8192, 1700000000, engine::ChatFormatKind::kLingV2};
  const auto parse = [&](const std::string& fields) {
    auto request = ParseApiRequest(Endpoint::kChat, std::string("{") + kChatHead + "," + fields + "}", roomy,
                                   *tokenizer_);
    EXPECT_TRUE(request.ok()) << request.error().message;
    return request->parser;
  };
  EXPECT_TRUE(parse(tools).tools);
  EXPECT_FALSE(parse(tools).single_tool_call);
  EXPECT_TRUE(parse(tools + R"(,"parallel_tool_calls":false)").single_tool_call);
  EXPECT_FALSE(parse(tools + R"(,"tool_choice":"none")").tools);
  EXPECT_FALSE(parse(R"("user":"u")").tools);
  EXPECT_TRUE(parse(R"("chat_template_kwargs":{"enable_thinking":true})").thinking);
}

TEST_F(ApiRequestTest, WritesConstraints) {
  const ModelInfo roomy{"tiny", 8192, 1700000000, engine::ChatFormatKind::kLingV2};
  const std::string tools = R"("tools":[{"type":"function","function":{"name":"f"}},)"
                            R"({"type":"function","function":{"name":"g","parameters":{"type":"object"}}}],)";
  const struct {
    std::string fields;
    std::string constraint;
  } cases[] = {
      {R"("response_format":{"type":"text"})", ""},
      {R"("response_format":{"type":"json_object"})", R"({"type":"json_object"})"},
      {R"("response_format":{"type":"json_schema","json_schema":{"name":"n","schema":{"type":"null"}}})",
       R"({"type":"json_schema","schema":{"type":"null"}})"},
      {R"("structured_outputs":{"choice":["a","b"]})", R"({"type":"choice","choices":["a","b"]})"},
      {R"("guided_json":"{\"type\":\"null\"}")", R"({"type":"json_schema","schema":{"type":"null"}})"},
      {tools + R"("tool_choice":"auto")", ""},
      {tools + R"("tool_choice":"required")",
       R"({"type":"tool_calls","tools":[{"name":"f"},{"name":"g","parameters":{"type":"object"}}],"single":false})"},
      {tools + R"("tool_choice":{"type":"function","function":{"name":"g"}})",
       R"({"type":"tool_calls","tools":[{"name":"g","parameters":{"type":"object"}}],"single":true})"},
  };
  for (const auto& c : cases) {
    auto request = ParseApiRequest(Endpoint::kChat, std::string("{") + kChatHead + "," + c.fields + "}",
                                   roomy, *tokenizer_);
    ASSERT_TRUE(request.ok()) << c.fields << ": " << request.error().message;
    EXPECT_EQ(request->sampling.constraint, c.constraint) << c.fields;
  }
}

TEST_F(ApiRequestTest, TakesNullAsAbsent) {
  auto request = ChatWith(
      R"("temperature":null,"stop":null,"seed":null,"tools":null,"max_tokens":null,"stream_options":null)");
  ASSERT_TRUE(request.ok()) << request.error().message;
  EXPECT_TRUE(request->stop.empty());
}

TEST_F(ApiRequestTest, JoinsContentPartsAndRendersTools) {
  auto whole = Chat(R"({"messages":[{"role":"user","content":"hello there"}]})");
  auto parts = Chat(
      R"({"messages":[{"role":"user","content":[{"type":"text","text":"hello "},{"type":"text","text":"there"}]}]})");
  ASSERT_TRUE(whole.ok() && parts.ok());
  EXPECT_EQ(whole->prompts, parts->prompts);

  const ModelInfo roomy{"tiny", 8192, 1700000000, engine::ChatFormatKind::kLingV2};
  auto tools = ParseApiRequest(
      Endpoint::kChat,
      R"({"messages":[{"role":"user","content":"hello there"}],)"
      R"("tools":[{"type":"function","function":{"name":"get_weather","parameters":{"type":"object"}}}]})",
      roomy, *tokenizer_);
  ASSERT_TRUE(tools.ok()) << tools.error().message;
  EXPECT_THAT((*tokenizer_).Decode(tools->prompts[0], /*skip_special=*/true), HasSubstr("get_weather"));
}

}  // namespace
}  // namespace millrace::server
