#pragma once
// Answers as OpenAI clients read them: whole bodies and stream chunks, for chat and for plain completions.

#include <string>
#include <vector>

#include "base/json.h"
#include "engine/sampling/params.h"
#include "engine/tokenizer/tokenizer.h"
#include "server/gateway/api_request.h"

namespace millrace::server {

struct Usage {
  int32_t prompt_tokens = 0;
  int32_t completion_tokens = 0;
  int32_t cached_tokens = 0;  // of the prompt
};

// Builds every body of one request: same id, created and model in each. One thread at a time.
class ResponseBuilder {
 public:
  ResponseBuilder(const ApiRequest& request, const ModelInfo& model, const engine::Tokenizer& tokenizer,
                  int64_t created);

  // Remembers the log-probabilities of a token; they go out with the next chunk or with the body.
  void AddToken(const engine::SampledToken& token);

  // Stream chunks (the JSON after "data: ").
  std::string RoleChunk(const Usage& usage);  // chat only: role=assistant, content ""
  std::string TextChunk(const std::string& text, const Usage& usage);
  std::string FinishChunk(const std::string& reason, const Usage& usage);
  std::string UsageChunk(const Usage& usage);  // choices: []

  // The whole answer.
  std::string Body(const std::string& text, const std::string& reason, const Usage& usage);

 private:
  Json Envelope(bool chunk) const;
  Json TakeLogprobs();
  Json TakeChatLogprobs();
  Json TakeCompletionLogprobs();
  std::string Chunk(Json choice, const Usage& usage);
  std::string TokenText(engine::TokenId token) const;

  const ApiRequest& request_;
  const ModelInfo& model_;
  const engine::Tokenizer& tokenizer_;
  const int64_t created_;
  std::vector<engine::SampledToken> pending_logprobs_;
  int64_t text_offset_ = 0;  // completions' logprobs: characters so far
};

}  // namespace millrace::server
