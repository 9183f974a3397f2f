#pragma once
// How many tokens a step may have, so that those who decode do not wait long for those who prefill.

#include <cstdint>

#include "base/clock.h"

namespace millrace::engine {

// What a token of a large step costs, measured. Engine thread only.
class StepCost {
 public:
  void OnStep(int32_t tokens, Duration time);
  // 0 until a step of a page or more was seen: small steps say little about large ones.
  double seconds_per_token() const { return seconds_per_token_; }

 private:
  double seconds_per_token_ = 0;
};

// Tokens of the next step when `num_decoding` sequences decode: as many as take `gap_target`, at least what
// lets all of them and one page of a prompt run, at most tokens_max. With nobody decoding, or no target,
// tokens_max. Every decoding sequence runs in every step, so the time between two of its tokens is at most
//   max(gap_target, time of one page beside the decoding sequences) + sampling,
// as well as the measured cost holds for the next step. Pure.
int32_t StepTokens(int32_t tokens_max, int32_t num_decoding, Duration gap_target, double seconds_per_token);

}  // namespace millrace::engine
