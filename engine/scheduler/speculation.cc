#include "engine/scheduler/speculation.h"

#include <bit>

namespace millrace::engine {
namespace {

constexpr int32_t kTrialSteps = 16;
// A probe is short, so that a text can go on being drafted after one, and rare, so that it costs little.
constexpr int32_t kProbeSteps = 8;
constexpr int32_t kProbeEvery = 512;

}  // namespace

size_t SpeculationGauge::BucketOf(int32_t num_sequences) {
  return static_cast<size_t>(std::bit_width(static_cast<uint32_t>(num_sequences)) % 32);
}

double SpeculationGauge::rate(int32_t num_decoding, bool drafting) const {
  const Bucket& bucket = buckets_[BucketOf(num_decoding)];
  return drafting ? bucket.with.rate() : bucket.without.rate();
}

bool SpeculationGauge::Use(int32_t num_decoding) {
  Bucket& bucket = buckets_[BucketOf(num_decoding)];
  if (bucket.with.steps < kTrialSteps) return true;
  if (bucket.without.steps < kTrialSteps) return false;
  const bool better = bucket.with.rate() >= bucket.without.rate();
  if (++bucket.since_probe < kProbeEvery) return better;
  if (bucket.since_probe >= kProbeEvery + kProbeSteps) bucket.since_probe = 0;
  return !better;
}

void SpeculationGauge::OnStep(int32_t num_sequences, int32_t num_drafts, bool drafting, int32_t num_tokens,
                              Duration time) {
  // The first step with drafts makes some and has none yet.
  if (drafting && 2 * num_drafts < num_sequences) return;
  Bucket& bucket = buckets_[BucketOf(num_sequences)];
  Measured& measured = drafting ? bucket.with : bucket.without;
  constexpr double kKeep = 0.95;
  measured.tokens = kKeep * measured.tokens + num_tokens;
  measured.seconds = kKeep * measured.seconds + Seconds(time);
  ++measured.steps;
}

}  // namespace millrace::engine
