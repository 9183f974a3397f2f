#pragma once
// One draw: a pure function of (logits, parameters, history, position). Two workers that see the same logits
// draw the same token; nothing is carried from step to step.

#include <cstdint>
#include <span>

#include "engine/sampling/params.h"

namespace millrace::engine {

struct SampleInput {
  std::span<const float> logits;         // [vocab_size]
  std::span<const int32_t> prompt;       // of this sequence
  std::span<const int32_t> output;       // tokens generated so far
  std::span<const int32_t> end_tokens;   // masked while output.size() < min_tokens
  int32_t num_tokens_in_vocabulary = 0;  // ids from here on have no token and are never drawn
};

// The log-probability of `token` and of the `num_logprobs` likeliest, by the logits as they are. Any thread.
SampledToken Score(std::span<const float> logits, int32_t num_tokens_in_vocabulary, int32_t token,
                   int32_t num_logprobs);

// The uniform number comes from (params.seed, output.size()). Ties go to the lowest id. Any thread.
SampledToken Sample(const SampleInput& input, const SamplingParams& params);

}  // namespace millrace::engine
