#include "server/router/speed.h"

#include <algorithm>
#include <cmath>
#include <utility>

namespace millrace::server {

double Believed(const Measured& own, double median) {
  if (own.value <= 0) return median;
  if (median <= 0) return own.value;
  const auto samples = static_cast<double>(own.samples);
  const double weight =
      samples / (samples + kBeliefSamples) * std::exp2(-Seconds(own.age) / Seconds(kBeliefHalfLife));
  return weight * own.value + (1 - weight) * median;
}

Medians::Medians(std::vector<double> values) : sorted_(std::move(values)) {
  std::erase_if(sorted_, [](double value) { return value <= 0; });
  std::sort(sorted_.begin(), sorted_.end());
}

double Medians::Without(double own) const {
  const auto found = std::lower_bound(sorted_.begin(), sorted_.end(), own);
  const bool present = found != sorted_.end() && *found == own;
  const size_t left = sorted_.size() - (present ? 1 : 0);
  if (left == 0) return 0;
  const size_t middle = (left - 1) / 2;
  const bool after = present && static_cast<size_t>(found - sorted_.begin()) <= middle;
  return sorted_[middle + (after ? 1 : 0)];
}

}  // namespace millrace::server
