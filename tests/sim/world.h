#pragma once
// Time and events of the simulation: what happens when, in an order that depends on the seed alone.

#include <queue>
#include <vector>

#include "absl/functional/any_invocable.h"
#include "base/clock.h"

namespace millrace::sim {

class World : public Clock {
 public:
  using Event = absl::AnyInvocable<void() &&>;
  TimePoint Now() const override { return now_; }
  void At(TimePoint when, Event event) {
    events_.push({std::max(when, now_), next_++, std::make_shared<Event>(std::move(event))});
  }
  void After(Duration wait, Event event) { At(now_ + wait, std::move(event)); }
  // Runs the next event; false when there is none up to `until`, and then it is `until`.
  bool Step(TimePoint until) {
    if (events_.empty() || events_.top().when > until) {
      now_ = std::max(now_, until);
      return false;
    }
    const Entry entry = events_.top();
    events_.pop();
    now_ = entry.when;
    std::move (*entry.event)();
    ++steps_;
    return true;
  }
  uint64_t steps() const { return steps_; }

 private:
  struct Entry {
    TimePoint when;
    uint64_t order;
    std::shared_ptr<Event> event;  // shared: priority_queue gives only copies
    bool operator<(const Entry& other) const {
      return when != other.when ? when > other.when : order > other.order;
    }
  };
  TimePoint now_{std::chrono::seconds(1)};
  uint64_t next_ = 0;
  uint64_t steps_ = 0;
  std::priority_queue<Entry> events_;
};

}  // namespace millrace::sim
