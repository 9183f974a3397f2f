#pragma once
// The seam through which protocol code takes turns and tells the time: a thread of its own, a strand, or the
// simulator.

#include <cstdint>

#include "absl/functional/any_invocable.h"
#include "base/clock.h"

namespace millrace::server {

// Runs tasks one after another, and tasks at a time, which it therefore knows. What only its tasks touch
// needs no lock. The queue has no bound of its own; each user states what bounds its tasks.
class TaskRunner : public Clock {
 public:
  using Task = absl::AnyInvocable<void() &&>;
  struct TimerId {
    TimePoint when;
    uint64_t number = 0;
    auto operator<=>(const TimerId&) const = default;
  };

  virtual void Post(Task task) = 0;  // any thread; tasks of one poster run in order
  // Runs `task` at `when` or soon after.
  virtual TimerId PostAt(TimePoint when, Task task) = 0;
  virtual void CancelTimer(const TimerId& timer) = 0;  // nothing when it ran already
};

}  // namespace millrace::server
