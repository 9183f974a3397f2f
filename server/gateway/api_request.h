#pragma once
// OpenAI request bodies, parsed and validated into native types at the edge. JSON does not travel further in.

#include <optional>
#include <string>
#include <vector>

#include "base/json.h"
#include "engine/sampling/params.h"
#include "engine/tokenizer/chat_format.h"
#include "engine/tokenizer/tokenizer.h"
#include "server/gateway/answer_parser.h"
#include "server/gateway/api_error.h"

namespace millrace::server {

enum class Endpoint { kChat, kCompletions, kResponses };

// What the parser needs to know of the model that is served.
struct ModelInfo {
  std::string name;
  int32_t context_max = 0;  // tokens, prompt and answer
  int64_t created = 0;      // Unix seconds
  engine::ChatFormatKind chat_format = engine::ChatFormatKind::kLingV2;
};

// One request, ready for workers: `n` choices for each prompt. Choice number = prompt number * n + i.
struct ApiRequest {
  Endpoint endpoint = Endpoint::kChat;
  std::string id;                             // "chatcmpl-..." or "cmpl-..."
  std::vector<std::vector<int32_t>> prompts;  // token ids; chat has one
  int32_t n = 1;
  engine::SamplingParams sampling;  // of choice 0; see SamplingOf
  std::vector<std::string> stop;    // stop strings, none empty
  bool include_stop = false;        // the stop string that was met stays in the text
  bool stream = false;
  bool include_usage = false;
  bool continuous_usage = false;
  bool skip_special_tokens = true;
  bool echo = false;  // completions only
  bool return_token_ids = false;
  bool include_reasoning = true;
  AnswerParserOptions parser;  // all off for completions
  int32_t priority = 0;
  std::string cache_salt;  // KV is shared only among requests of one salt
  std::optional<double> timeout_seconds;
  std::string request_id;                   // the client's name for it, or empty
  std::vector<std::string> unknown_fields;  // accepted, to be logged once

  int32_t num_choices() const { return static_cast<int32_t>(prompts.size()) * n; }
  const std::vector<int32_t>& PromptOf(int32_t choice) const {
    return prompts[static_cast<size_t>(choice / n)];
  }
  // Each choice draws from a seed of its own; choice 0 from the client's, so that n = 1 and n > 1 begin
  // alike.
  engine::SamplingParams SamplingOf(int32_t choice) const;
};

inline constexpr int32_t kChoicesMax = 128;  // of one request, prompts times n

// Parses a body for `endpoint`. Every error is a 4xx that names the field. Pure but for the random seed and
// id that it draws when the client gave none. Any thread.
ApiResult<ApiRequest> ParseApiRequest(Endpoint endpoint, std::string_view body, const ModelInfo& model,
                                      const engine::Tokenizer& tokenizer);

// The checks that every body shares: UTF-8, JSON, an object, and a `model` that is the one served (or none).
ApiResult<Json> ParseBody(std::string_view body, const ModelInfo& model);

// The text and the token ids of the prompt that a chat body (parsed text `body`) becomes.
struct RenderedPrompt {
  std::string text;
  std::vector<int32_t> ids;
  AnswerParserOptions parser;
  bool has_tools = false;
  std::string tool_constraint;  // the calls that must come (engine/grammar/constraint.h), or empty
};
ApiResult<RenderedPrompt> RenderPrompt(std::string_view body, const ModelInfo& model,
                                       const engine::Tokenizer& tokenizer);

// A client's name for a request lands in logs and headers: letters, digits, - _ . and at most 128 of them.
bool IsRequestId(std::string_view text);

}  // namespace millrace::server
