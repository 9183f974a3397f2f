#include "transfer/path.h"

namespace millrace::transfer {
namespace {

constexpr double kNewShare = 0.2;           // of a sample in a smoothed value
constexpr uint64_t kSampleBytes = 1 << 20;  // bandwidth is sampled over at least so much

void Smooth(double* value, double sample) {
  *value = *value == 0 ? sample : *value + kNewShare * (sample - *value);
}

}  // namespace

void PathMeter::Landed(TimePoint now, TimePoint sent, uint64_t bytes, bool alone,
                       uint64_t bytes_in_flight_after) {
  bytes_done_ += bytes;
  ++slices_done_;
  busy_bytes_ += bytes;
  if (alone) Smooth(&delay_seconds_, Seconds(now - sent));
  if (busy_bytes_ < kSampleBytes && bytes_in_flight_after > 0) return;
  const double busy = Seconds(now - busy_since_);
  if (busy > 0 && busy_bytes_ >= kSampleBytes)
    Smooth(&bytes_per_second_, static_cast<double>(busy_bytes_) / busy);
  busy_since_ = now;
  busy_bytes_ = 0;
}

void PathMeter::Fill(PathSnapshot* snapshot) const {
  snapshot->bytes_done = bytes_done_;
  snapshot->slices_done = slices_done_;
  snapshot->bytes_per_second = bytes_per_second_;
  snapshot->delay_seconds = delay_seconds_;
}

}  // namespace millrace::transfer
