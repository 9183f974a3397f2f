#pragma once
// Answers as OpenAI clients read them: whole bodies and stream chunks, for chat and for plain completions.

#include <string>
#include <vector>

#include "base/json.h"
#include "engine/tokenizer/tokenizer.h"
#include "server/gateway/answer_format.h"
#include "server/gateway/api_request.h"

namespace millrace::server {

Json UsageJson(const Usage& usage);

// Same id, created and model in every body of one request. Everything borrowed outlives it.
class ResponseBuilder final : public AnswerFormat {
 public:
  ResponseBuilder(const ApiRequest& request, const ModelInfo& model, const engine::Tokenizer& tokenizer,
                  int64_t created);

  std::string Begin(const Usage& usage) override;  // chat: role=assistant, content "", per choice
  // One chunk per part of the delta; a finish comes alone in the last, with an empty delta.
  std::string Delta(const ChoiceDelta& delta, const Usage& usage) override;
  std::string End(const Usage& usage) override;
  std::string Failure(const ApiError& error) override;
  void Collect(const ChoiceDelta& delta) override;
  std::string Whole(const Usage& usage) override;

 private:
  struct Collected {
    std::string content;
    std::string reasoning;
    Json tool_calls = Json::array();
    std::vector<engine::SampledToken> prompt;
    std::vector<engine::SampledToken> tokens;
    std::string finish;
  };

  bool chat() const { return request_.endpoint == Endpoint::kChat; }
  Json Envelope(bool chunk) const;
  using Tokens = std::vector<engine::SampledToken>;
  Json Logprobs(const Tokens& prompt, const Tokens& tokens, int32_t choice);
  Json ChatLogprobs(const Tokens& tokens) const;
  Json CompletionLogprobs(const Tokens& prompt, const Tokens& tokens, int32_t choice);
  Json Message(const Collected& collected) const;
  std::string Chunk(Json choice, int32_t index, const Usage& usage) const;

  const ApiRequest& request_;
  const ModelInfo& model_;
  const engine::Tokenizer& tokenizer_;
  const int64_t created_;
  std::vector<Collected> collected_;   // per choice
  std::vector<int64_t> text_offsets_;  // per choice, completions' logprobs: characters so far
  std::vector<bool> prompt_ids_said_;  // per choice, completions' return_token_ids
};

}  // namespace millrace::server
