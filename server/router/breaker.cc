#include "server/router/breaker.h"

#include <algorithm>

namespace millrace::server {

BreakerState Breaker::state(TimePoint now) const {
  if (!tripped_) return BreakerState::kClosed;
  return now < open_until_ ? BreakerState::kOpen : BreakerState::kProbation;
}

bool Breaker::Allows(TimePoint now) const {
  const BreakerState current = state(now);
  return current == BreakerState::kClosed || (current == BreakerState::kProbation && !trial_running_);
}

void Breaker::OnBegin(TimePoint now) {
  if (state(now) == BreakerState::kProbation) trial_running_ = true;
}

void Breaker::OnSuccess() {
  failures_ = 0;
  if (!tripped_) return;
  trial_running_ = false;
  if (++trials_passed_ < options_.trials) return;
  tripped_ = false;
  trials_passed_ = 0;
  open_for_ = Duration(0);
}

void Breaker::OnFailure(TimePoint now, double chance) {
  ++failures_;
  const BreakerState before = state(now);
  trial_running_ = false;
  // What was already under way when it opened fails too, and says nothing new.
  if (before == BreakerState::kOpen) return;
  if (before == BreakerState::kClosed && failures_ < options_.failures_max) return;
  tripped_ = true;
  trials_passed_ = 0;
  open_for_ = std::clamp(2 * open_for_, options_.open_min, options_.open_max);
  const auto spread = static_cast<int64_t>(0.5 * chance * static_cast<double>(open_for_.count()));
  open_until_ = now + open_for_ + Duration(spread);
}

void Breaker::OnNeither() { trial_running_ = false; }

}  // namespace millrace::server
