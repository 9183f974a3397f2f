#include "transfer/path_meter.h"

#include <algorithm>
#include <cmath>
#include <utility>

namespace millrace::transfer {
namespace {

constexpr double kGain = 0.25;                // of one whole slice
constexpr double kFullWeightBytes = 64e3;     // smaller ones count less
constexpr uint64_t kRateBytesMin = 32 << 10;  // with less under way the delay hides the rate
constexpr Duration kDelayPeriod = std::chrono::seconds(5);
constexpr double kUnknownBytesPerSecond = 1e9;

}  // namespace

void PathMeter::Probed(TimePoint now, Duration took) {
  const auto least = [](Duration a, Duration b) {
    return a == Duration::zero() ? b : b == Duration::zero() ? a : std::min(a, b);
  };
  if (now - period_began_ > kDelayPeriod) {
    delay_before_ = std::exchange(delay_period_, Duration::zero());
    period_began_ = now;
  }
  delay_period_ = least(delay_period_, std::max(took, Duration(1)));
  delay_ = least(delay_period_, delay_before_);
}

void PathMeter::Landed(TimePoint now, Duration took, uint64_t queued, uint64_t bytes, bool trial) {
  if (queued == bytes && bytes < kRateBytesMin) Probed(now, took);
  const double seconds = Seconds(took);
  deviation_ += kGain * (std::abs(seconds - Seconds(Predict(queued))) - deviation_);
  if (queued < kRateBytesMin) return;
  const double sample = std::max(seconds - Seconds(delay_), seconds * 0.1) / static_cast<double>(queued);
  if (seconds_per_byte_ == 0 || (trial && sample < seconds_per_byte_)) {
    seconds_per_byte_ = sample;
  } else {
    const double gain = kGain * std::min(1.0, static_cast<double>(bytes) / kFullWeightBytes);
    seconds_per_byte_ += gain * (sample - seconds_per_byte_);
  }
  least_seconds_per_byte_ =
      least_seconds_per_byte_ == 0 ? seconds_per_byte_ : std::min(least_seconds_per_byte_, seconds_per_byte_);
}

void PathMeter::Late(Duration so_far, uint64_t queued) {
  if (queued < kRateBytesMin) return;
  seconds_per_byte_ = std::max(seconds_per_byte_, kGain * Seconds(so_far) / static_cast<double>(queued) +
                                                      (1 - kGain) * seconds_per_byte_);
}

double PathMeter::bytes_per_second() const { return seconds_per_byte_ > 0 ? 1 / seconds_per_byte_ : hint_; }

Duration PathMeter::Predict(uint64_t queued) const {
  const double rate = bytes_per_second() > 0 ? bytes_per_second() : kUnknownBytesPerSecond;
  return delay_ + Duration(static_cast<int64_t>(static_cast<double>(queued) / rate * 1e9));
}

}  // namespace millrace::transfer
