#pragma once
// Whether a worker that failed is asked again: a circuit breaker. Pure state: time and chance come from
// outside.

#include "base/clock.h"

namespace millrace::server {

struct BreakerOptions {
  int32_t failures_max = 3;                     // in a row; then it opens
  Duration open_min = std::chrono::seconds(1);  // doubles with each trial that fails
  Duration open_max = std::chrono::seconds(15);
  int32_t trials = 3;  // in a row, one at a time, that must succeed before it closes again
};

// closed: asked like any other. open: not asked. probation: one request at a time, to find out.
enum class BreakerState { kClosed, kOpen, kProbation };

// Not thread-safe.
class Breaker {
 public:
  explicit Breaker(const BreakerOptions& options) : options_(options) {}

  BreakerState state(TimePoint now) const;
  // Closed, or on probation while no trial runs.
  bool Allows(TimePoint now) const;
  // A request was given to the worker. On probation it is the trial, until one of the next three is said.
  void OnBegin(TimePoint now);
  void OnSuccess();
  // `chance` in [0, 1) spreads the moments at which breakers of many callers ask again: up to half longer.
  void OnFailure(TimePoint now, double chance);
  void OnNeither();  // it ended for a reason that says nothing about the worker
  // Nothing is held against the worker.
  bool clear() const { return !tripped_ && failures_ == 0; }

 private:
  BreakerOptions options_;
  int32_t failures_ = 0;  // in a row
  bool tripped_ = false;  // open or on probation
  TimePoint open_until_{};
  Duration open_for_{0};
  int32_t trials_passed_ = 0;
  bool trial_running_ = false;
};

}  // namespace millrace::server
