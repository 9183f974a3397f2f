#include "engine/scheduler/step_budget.h"

#include <algorithm>

#include "engine/kv/layout.h"

namespace millrace::engine {

void StepCost::OnStep(int32_t tokens, Duration time) {
  if (tokens < kPageTokens) return;
  constexpr double kKeep = 0.7;
  const double measured = Seconds(time) / tokens;
  seconds_per_token_ =
      seconds_per_token_ == 0 ? measured : kKeep * seconds_per_token_ + (1 - kKeep) * measured;
}

int32_t StepTokens(int32_t tokens_max, int32_t num_decoding, Duration gap_target, double seconds_per_token) {
  if (num_decoding == 0 || gap_target == Duration(0) || seconds_per_token <= 0) return tokens_max;
  // All decoding sequences beside the share that Schedule keeps for prefill: a page or a quarter.
  const int32_t needed = std::max(num_decoding + kPageTokens, (4 * num_decoding + 2) / 3);
  const double affordable =
      std::min(Seconds(gap_target) / seconds_per_token, static_cast<double>(tokens_max));
  return std::min(std::max(static_cast<int32_t>(affordable), std::max(needed, kPageTokens + 1)), tokens_max);
}

}  // namespace millrace::engine
