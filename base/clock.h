#pragma once
// Time seam. Production code asks a Clock, so that tests and the simulator own time.

#include <atomic>
#include <chrono>
#include <cstdint>

namespace millrace {

using Duration = std::chrono::nanoseconds;
using TimePoint = std::chrono::time_point<std::chrono::steady_clock, Duration>;

inline constexpr TimePoint kNoDeadline = TimePoint::max();

class Clock {
 public:
  virtual ~Clock() = default;
  virtual TimePoint Now() const = 0;  // monotonic; any thread
  static const Clock& System();       // the process's steady clock; lives for ever
};

// A clock that moves only when told. Any thread.
class FakeClock : public Clock {
 public:
  TimePoint Now() const override { return TimePoint(Duration(now_ns_.load())); }
  void Advance(Duration by) { now_ns_ += by.count(); }

 private:
  std::atomic<int64_t> now_ns_{1'000'000'000};
};

inline const Clock& Clock::System() {
  class SystemClock : public Clock {
   public:
    TimePoint Now() const override { return std::chrono::steady_clock::now(); }
  };
  static const SystemClock clock;
  return clock;
}

inline double Seconds(Duration d) { return std::chrono::duration<double>(d).count(); }

}  // namespace millrace
