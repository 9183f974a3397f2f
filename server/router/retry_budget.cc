#include "server/router/retry_budget.h"

#include <algorithm>

namespace millrace::server {

void RetryBudget::OnRequest() { saved_ = std::min(saved_ + options_.per_request, options_.burst_max); }

Duration RetryBudget::Take(TimePoint now) {
  if (at_ != TimePoint{}) saved_ += Seconds(now - at_) * options_.per_second;
  at_ = now;
  saved_ = std::min(saved_, options_.burst_max) - 1;
  if (saved_ >= 0) return Duration(0);
  return std::chrono::duration_cast<Duration>(std::chrono::duration<double>(-saved_ / options_.per_second));
}

}  // namespace millrace::server
