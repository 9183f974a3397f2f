#pragma once
// OpenAI request bodies, parsed and validated into native types at the edge. JSON does not travel further in.

#include <optional>
#include <string>
#include <vector>

#include "base/json.h"
#include "engine/sampling/params.h"
#include "engine/tokenizer/chat_format.h"
#include "engine/tokenizer/tokenizer.h"
#include "server/gateway/api_error.h"

namespace millrace::server {

enum class Endpoint { kChat, kCompletions };

// What the parser needs to know of the model that is served.
struct ModelInfo {
  std::string name;
  int32_t context_max = 0;  // tokens, prompt and answer
  int64_t created = 0;      // Unix seconds
  engine::ChatFormatKind chat_format = engine::ChatFormatKind::kLingV2;
};

// One request, ready for a worker.
struct ApiRequest {
  Endpoint endpoint = Endpoint::kChat;
  std::string id;               // "chatcmpl-..." or "cmpl-..."
  std::vector<int32_t> prompt;  // token ids
  engine::SamplingParams sampling;
  std::vector<std::string> stop;  // stop strings, none empty
  bool stream = false;
  bool include_usage = false;
  bool continuous_usage = false;
  bool skip_special_tokens = true;
  bool echo = false;  // completions only
  int32_t priority = 0;
  std::string cache_salt;  // KV is shared only among requests of one salt
  std::optional<double> timeout_seconds;
  std::vector<std::string> unknown_fields;  // accepted, to be logged once
};

// Parses a body for `endpoint`. Every error is a 4xx that names the field. Pure but for the random seed and
// id that it draws when the client gave none. Any thread.
ApiResult<ApiRequest> ParseApiRequest(Endpoint endpoint, std::string_view body, const ModelInfo& model,
                                      const engine::Tokenizer& tokenizer);

}  // namespace millrace::server
