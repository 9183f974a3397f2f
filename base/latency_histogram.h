#pragma once
// Latencies in nanoseconds, in buckets whose width is under 1 % of their value (the log-linear layout of
// HdrHistogram: Tene 2012). Fixed memory; one thread
// records, Merge joins.

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <vector>

namespace millrace {

class LatencyHistogram {
 public:
  void Record(int64_t nanoseconds) {
    const auto value = static_cast<uint64_t>(std::max<int64_t>(nanoseconds, 0));
    ++counts_[BucketOf(value)];
    ++count_;
    max_ = std::max(max_, value);
    sum_ += static_cast<double>(value);
  }

  void Merge(const LatencyHistogram& other) {
    for (size_t i = 0; i < counts_.size(); ++i) counts_[i] += other.counts_[i];
    count_ += other.count_;
    max_ = std::max(max_, other.max_);
    sum_ += other.sum_;
  }

  uint64_t count() const { return count_; }
  double mean() const { return count_ == 0 ? 0 : sum_ / static_cast<double>(count_); }  // exact

  // Calls f(largest value of the bucket, count) for every bucket that is not empty, in ascending order.
  template <typename F>
  void ForEachBucket(F f) const {
    for (size_t i = 0; i < counts_.size(); ++i) {
      if (counts_[i] > 0) f(std::min(max_, LastOf(i)), counts_[i]);
    }
  }

  // The smallest recorded value (to a bucket's width) that `percent` of all values do not exceed; 0 when
  // there is none. 100 gives the exact maximum.
  uint64_t Percentile(double percent) const {
    if (count_ == 0) return 0;
    const auto wanted =
        std::max<uint64_t>(1, static_cast<uint64_t>(std::ceil(static_cast<double>(count_) * percent / 100)));
    uint64_t seen = 0;
    for (size_t i = 0; i < counts_.size(); ++i) {
      seen += counts_[i];
      if (seen >= wanted) return std::min(max_, LastOf(i));
    }
    return max_;
  }

 private:
  static constexpr int kSubBits = 7;  // 128 buckets per octave
  static constexpr uint64_t kSub = uint64_t{1} << kSubBits;

  static size_t BucketOf(uint64_t value) {
    if (value < kSub) return value;
    const int shift = std::bit_width(value) - kSubBits - 1;
    return static_cast<size_t>(shift + 1) * kSub + ((value >> shift) - kSub);
  }
  // The largest value of a bucket.
  static uint64_t LastOf(size_t bucket) {
    if (bucket < kSub) return bucket;
    const uint64_t shift = bucket / kSub - 1;
    return ((bucket % kSub + kSub + 1) << shift) - 1;
  }

  std::vector<uint64_t> counts_ = std::vector<uint64_t>((64 - kSubBits + 1) * kSub);
  uint64_t count_ = 0;
  uint64_t max_ = 0;
  double sum_ = 0;
};

}  // namespace millrace
