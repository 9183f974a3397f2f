#pragma once
// What is known of one path's speed, from what it carried. Pure; transfer thread only.
//
// A path is taken for a queue: a slice sent when `queued` bytes (itself included) were under way is answered
// after delay + queued / rate. The two are kept apart: the delay is the least time that a probe or a small
// slice took alone; what a larger slice took beyond it, over the bytes before it, is the rate. So the rate is
// right for a busy path and for one that carries a slice now and then. Failures and flushes teach nothing.

#include <cstdint>

#include "base/clock.h"

namespace millrace::transfer {

class PathMeter {
 public:
  explicit PathMeter(double bytes_per_second_hint) : hint_(bytes_per_second_hint) {}

  // A round trip that found the path idle and carried next to nothing.
  void Probed(TimePoint now, Duration took);
  // A slice that was answered as landed. `trial`: the rate before it is out of date, and a better one
  // replaces it.
  void Landed(TimePoint now, Duration took, uint64_t queued, uint64_t bytes, bool trial);
  // A slice is still not answered after `so_far`: the rate is no higher than that says.
  void Late(Duration so_far, uint64_t queued);

  bool measured() const { return seconds_per_byte_ > 0; }
  // It has been more than twice as fast: what slowed it may be over.
  bool HasBeenFaster() const { return seconds_per_byte_ > 2 * least_seconds_per_byte_; }
  double bytes_per_second() const;           // measured, else the hint, else 0
  Duration delay() const { return delay_; }  // zero: not yet
  Duration deviation() const { return Duration(static_cast<int64_t>(deviation_ * 1e9)); }
  // From sending to the answer, with `queued` bytes under way. Without any measurement: at 1 GB/s.
  Duration Predict(uint64_t queued) const;

 private:
  double hint_;
  double seconds_per_byte_ = 0;        // smoothed; 0: not yet
  double least_seconds_per_byte_ = 0;  // ever
  double deviation_ = 0;               // s; smoothed distance of prediction and truth
  Duration delay_{};                   // least of this period and the last
  Duration delay_period_{};            // least of this period
  Duration delay_before_{};            // of the last
  TimePoint period_began_{};
};

}  // namespace millrace::transfer
