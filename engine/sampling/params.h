#pragma once
// What a client may ask of sampling, and what comes out of one draw. Plain data, validated at the edge.

#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "engine/sampling/token_mask.h"

namespace millrace::engine {

struct SamplingParams {
  float temperature = 1;         // 0 = greedy
  float top_p = 1;               // (0, 1]
  int32_t top_k = 0;             // 0 = off
  float min_p = 0;               // [0, 1]
  float repetition_penalty = 1;  // > 0; over prompt and output
  float presence_penalty = 0;    // over output
  float frequency_penalty = 0;   // over output
  uint64_t seed = 0;             // always explicit here; the edge draws one when the client gave none
  int32_t max_tokens = 16;       // new tokens, >= 1
  int32_t min_tokens = 0;        // end tokens are masked before that many
  bool ignore_eos = false;
  std::vector<int32_t> stop_token_ids;                // besides the model's own end tokens
  std::vector<std::pair<int32_t, float>> logit_bias;  // added to logits before anything else
  // What the answer is held to: the text that made `mask` (engine/grammar/constraint.h), or empty. It travels
  // with the request; each worker makes its own mask.
  std::string constraint;
  std::shared_ptr<TokenMask>
      mask;  // null: every token may come; shared by the copies of one request's parameters
  // The prompt's tokens get log-probabilities too, as many as num_logprobs says. Such a prompt is computed in
  // full.
  bool prompt_logprobs = false;
  int32_t num_logprobs = -1;  // -1 none, 0 the chosen token's only, n also the n most likely (<= 20)
};

struct TokenLogprob {
  int32_t token = 0;
  float logprob =
      0;  // natural log, of the model's distribution at temperature 1 after logit_bias and penalties
};

struct SampledToken {
  int32_t token = 0;
  float logprob = 0;              // valid when num_logprobs >= 0
  std::vector<TokenLogprob> top;  // num_logprobs entries, most likely first
};

}  // namespace millrace::engine
