#pragma once
// Rotary position embedding of the Ling models: half-rotation of the first rotary_dim dimensions, YaRN and
// linear scaling.

#include <vector>

#include "engine/model/config.h"

namespace millrace::engine {

// Immutable; any thread.
class Rope {
 public:
  explicit Rope(const ModelConfig& config);
  int32_t pairs() const { return static_cast<int32_t>(frequencies_.size()); }
  // cos and sin of `position` for every pair, attention factor included: [pairs] each.
  void Angles(int32_t position, float* cos, float* sin) const;
  // Rotates one head, [head_dim], in place.
  void Apply(const float* cos, const float* sin, float* head) const;

 private:
  std::vector<double> frequencies_;  // radians per position, [rotary_dim / 2]
  double factor_ = 1;                // YaRN's, on cos and sin
};

}  // namespace millrace::engine
