#pragma once
// One choice of an answer: from tokens to what its client sees.

#include <string>
#include <vector>

#include "engine/core/engine.h"
#include "server/gateway/answer_parser.h"
#include "server/gateway/answer_text.h"
#include "server/gateway/api_request.h"

namespace millrace::server {

struct ChoiceDelta {
  int32_t choice = 0;
  AnswerDelta parts;
  std::vector<engine::SampledToken> prompt;  // see TokenEvent; in the first delta
  std::vector<engine::SampledToken> tokens;  // drawn since the last delta
  std::string finish;                        // "" while it goes on; stop, length or tool_calls
  bool empty() const { return parts.empty() && finish.empty(); }
};

// One thread at a time. The request and the tokenizer outlive it.
class Choice {
 public:
  Choice(const ApiRequest& request, const engine::Tokenizer& tokenizer, int32_t index);

  // What the token adds; empty while text is held back, its tokens then come with a later delta. After a
  // delta with a finish nothing is pushed any more.
  ChoiceDelta Push(const engine::TokenEvent& token);

  int32_t num_tokens() const { return num_tokens_; }
  int32_t num_reasoning_tokens() const { return num_reasoning_tokens_; }

 private:
  void Append(const AnswerDelta& parts);

  const ApiRequest& request_;
  const engine::Tokenizer& tokenizer_;
  AnswerText text_;
  AnswerParser parser_;
  ChoiceDelta pending_;
  const int32_t index_;
  int32_t num_tokens_ = 0;
  int32_t num_reasoning_tokens_ = 0;
};

}  // namespace millrace::server
