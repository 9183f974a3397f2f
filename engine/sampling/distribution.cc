#include "engine/sampling/distribution.h"

#include <algorithm>
#include <cstring>

#include "base/check.h"

namespace millrace::engine {
namespace {

// Copies of the table of sums, so that tokens of one bucket in a row do not wait for each other.
constexpr size_t kCopies = 4;

}  // namespace

void Distribution::Assign(std::span<const float> logits, float best, double inverse_temperature) {
  logits_ = logits;
  weights_.resize(logits.size());
  numbers_.resize(logits.size());
  members_of_ = kNoBucket;
  BestLogitKernels().weigh(logits, best, inverse_temperature, weights_.data(), numbers_.data());
  Bucket sums[kNumBuckets + 1][kCopies] = {};
  const auto add = [&](size_t i) {
    Bucket& sum = sums[numbers_[i]][i % kCopies];
    ++sum.count;
    sum.mass += weights_[i];
  };
  size_t i = 0;
  for (; i + kCopies <= logits.size(); i += kCopies) {
    for (size_t copy = 0; copy < kCopies; ++copy) add(i + copy);
  }
  for (; i < logits.size(); ++i) add(i);
  size_ = 0;
  total_ = 0;
  for (size_t b = 0; b < kNumBuckets; ++b) {
    buckets_[b] = {};
    for (const Bucket& sum : sums[b]) {
      buckets_[b].count += sum.count;
      buckets_[b].mass += sum.mass;
    }
    size_ += buckets_[b].count;
    total_ += buckets_[b].mass;
  }
}

Distribution::Prefix Distribution::Take(int64_t count_max, double mass_min, double weight_min) {
  Prefix taken;
  for (size_t b = 0; b < kNumBuckets && taken.count < count_max; ++b) {
    const Bucket& bucket = buckets_[b];
    if (bucket.count == 0) continue;
    if (weight_min == 0 && taken.count + bucket.count <= count_max && taken.mass + bucket.mass < mass_min) {
      taken.count += bucket.count;
      taken.mass += bucket.mass;
      continue;
    }
    for (const Member& member : Sorted(b)) {
      const bool stop = taken.count == count_max || !(taken.mass < mass_min) || member.weight < weight_min;
      if (taken.count > 0 && stop) return taken;
      ++taken.count;
      taken.mass += member.weight;
    }
  }
  return taken;
}

int32_t Distribution::Pick(int64_t count, double target) {
  int64_t before = 0;
  double below = 0;
  for (size_t b = 0; b < kNumBuckets; ++b) {
    const Bucket& bucket = buckets_[b];
    if (bucket.count == 0) continue;
    if (before + bucket.count < count && below + bucket.mass <= target) {
      before += bucket.count;
      below += bucket.mass;
      continue;
    }
    for (const Member& member : Sorted(b)) {
      below += member.weight;
      if (++before == count || below > target) return member.token;
    }
  }
  MR_CHECK(false, "{} of {} tokens", count, size_);
}

// The members of a bucket, most likely first.
std::span<const Distribution::Member> Distribution::Sorted(size_t bucket) {
  if (members_of_ == bucket) return members_;
  members_of_ = bucket;
  members_.clear();
  const uint8_t* const begin = numbers_.data();
  const uint8_t* const end = begin + numbers_.size();
  for (const uint8_t* at = begin; static_cast<int64_t>(members_.size()) < buckets_[bucket].count; ++at) {
    at =
        static_cast<const uint8_t*>(std::memchr(at, static_cast<int>(bucket), static_cast<size_t>(end - at)));
    const auto token = static_cast<size_t>(at - begin);
    members_.push_back({logits_[token], static_cast<int32_t>(token), weights_[token]});
  }
  std::sort(members_.begin(), members_.end(), [](const Member& a, const Member& b) {
    return a.logit > b.logit || (a.logit == b.logit && a.token < b.token);
  });
  return members_;
}

}  // namespace millrace::engine
