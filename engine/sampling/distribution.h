#pragma once
// The tokens of one row with their weights, as far as somebody looks in order of likelihood. Sums run over
// buckets of like tokens from the most likely down, inside a bucket by id, or from the most likely down in
// one that is looked into: the same floats in the same order on every worker.

#include <array>
#include <cstdint>
#include <limits>
#include <span>
#include <vector>

#include "engine/sampling/logit_kernels.h"

namespace millrace::engine {

// Reused from draw to draw; one thread at a time.
class Distribution {
 public:
  // `best` is the highest of the logits. Keeps the span until the next call.
  void Assign(std::span<const float> logits, float best, double inverse_temperature);

  int64_t size() const { return size_; }  // tokens that weigh anything; 0 only where `best` is not finite
  double total() const { return total_; }

  struct Prefix {
    int64_t count = 0;
    double mass = 0;
  };
  // The most likely tokens, equals by id, until there are `count_max`, or those before weigh `mass_min`, or
  // the next weighs less than `weight_min`. At least one.
  Prefix Take(int64_t count_max, double mass_min = std::numeric_limits<double>::infinity(),
              double weight_min = 0);
  // Among the `count` most likely, the first with which the sum exceeds `target`; the last if none does.
  int32_t Pick(int64_t count, double target);

 private:
  struct Member {
    float logit;
    int32_t token;
    double weight;
  };
  struct Bucket {
    int64_t count = 0;
    double mass = 0;
  };
  std::span<const Member> Sorted(size_t bucket);

  std::span<const float> logits_;
  std::vector<double> weights_;   // per token
  std::vector<uint8_t> numbers_;  // the bucket of each
  std::array<Bucket, kNumBuckets> buckets_;
  int64_t size_ = 0;
  double total_ = 0;
  std::vector<Member> members_;  // of the bucket looked into last
  size_t members_of_ = kNoBucket;
};

}  // namespace millrace::engine
