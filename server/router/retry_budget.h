#pragma once
// How fast requests that lost their worker go to another one. Pure: the time comes from outside.

#include <cstdint>

#include "base/clock.h"

namespace millrace::server {

struct RetryBudgetOptions {
  double per_second = 200;   // retries that are always affordable
  double per_request = 0.2;  // and so many for each request that came
  double burst_max = 200;    // saved up at most
};

// The loss of a worker brings all that it ran to the others at once. A budget spreads them: nobody is refused
// for it, later ones wait their turn. Not thread-safe.
class RetryBudget {
 public:
  explicit RetryBudget(const RetryBudgetOptions& options = {})
      : options_(options), saved_(options.burst_max) {}

  void OnRequest();
  // A retry: how long it has to wait from `now`.
  Duration Take(TimePoint now);

 private:
  const RetryBudgetOptions options_;
  double saved_;  // negative: so many are waiting
  TimePoint at_{};
};

}  // namespace millrace::server
