#include "engine/scheduler/speculation.h"

#include <algorithm>
#include <bit>

namespace millrace::engine {
namespace {

constexpr int32_t kTrialSteps = 16;
// A probe is short, so that a text can go on being drafted after one, and rare, so that it costs little.
constexpr int32_t kProbeSteps = 8;
constexpr int32_t kProbeEvery = 512;
constexpr int32_t kProbeEveryMax = 4 * kProbeEvery;
constexpr double kLongest =
    3;  // times the mean: what a step counts at most, since it may have been interrupted
constexpr int64_t kRecentUses = 512;

}  // namespace

size_t SpeculationGauge::BucketOf(int32_t num_sequences) {
  return static_cast<size_t>(std::bit_width(static_cast<uint32_t>(num_sequences)) % 32);
}

bool SpeculationGauge::Bucket::in_trial() const {
  return with.steps < kTrialSteps || without.steps < kTrialSteps;
}

double SpeculationGauge::rate(int32_t num_decoding, bool drafting) const {
  const Bucket& bucket = buckets_[BucketOf(num_decoding)];
  return drafting ? bucket.with.rate() : bucket.without.rate();
}

bool SpeculationGauge::Use(int32_t num_decoding) {
  Bucket& bucket = buckets_[BucketOf(num_decoding)];
  bucket.last_use = uses_++;
  if (bucket.in_trial()) return bucket.with.steps < kTrialSteps;
  if (bucket.probe_left > 0) return !bucket.better;
  bucket.better = bucket.with.rate() >= bucket.without.rate();
  if (++bucket.since_probe < std::max(bucket.probe_every, kProbeEvery)) return bucket.better;
  bucket.since_probe = 0;
  bucket.probe_left = kProbeSteps;
  return !bucket.better;
}

void SpeculationGauge::OnStep(int32_t num_sequences, int32_t num_drafts, bool drafting, int32_t num_tokens,
                              Duration time) {
  // The first step with drafts makes some and has none yet.
  if (drafting && 2 * num_drafts < num_sequences) return;
  Bucket& bucket = buckets_[BucketOf(num_sequences)];
  Measured& measured = bucket.of(drafting);
  constexpr double kKeep = 0.95;
  double seconds = Seconds(time);
  if (measured.weight > 0) seconds = std::min(seconds, kLongest * measured.seconds / measured.weight);
  measured.tokens = kKeep * measured.tokens + num_tokens;
  measured.seconds = kKeep * measured.seconds + seconds;
  measured.weight = kKeep * measured.weight + 1;
  ++measured.steps;
  if (bucket.probe_left == 0 || drafting == bucket.better || --bucket.probe_left > 0) return;
  const bool changed = (bucket.with.rate() >= bucket.without.rate()) != bucket.better;
  bucket.probe_every =
      changed ? kProbeEvery : std::min(2 * std::max(bucket.probe_every, kProbeEvery), kProbeEveryMax);
}

bool SpeculationGauge::Fill() const {
  if (uses_ == 0) return true;
  return std::any_of(buckets_.begin(), buckets_.end(), [&](const Bucket& bucket) {
    const bool recent = bucket.last_use >= 0 && uses_ - bucket.last_use <= kRecentUses;
    return recent && (bucket.in_trial() || bucket.better || bucket.probe_left > 0);
  });
}

}  // namespace millrace::engine
