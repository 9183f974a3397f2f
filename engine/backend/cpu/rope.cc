#include "engine/backend/cpu/rope.h"

#include <algorithm>
#include <cmath>

namespace millrace::engine {
namespace {

// YaRN (Peng et al. 2023): the dimension whose wave makes `turns` turns within the original context.
double CorrectionDim(double turns, double rotary_dim, double theta, double original) {
  return rotary_dim * std::log(original / (2 * M_PI * turns)) / (2 * std::log(theta));
}

}  // namespace

Rope::Rope(const ModelConfig& config) {
  const double rotary_dim = config.rotary_dim;
  for (int32_t i = 0; i < config.rotary_dim / 2; ++i) {
    frequencies_.push_back(std::pow(config.rope_theta, -2.0 * i / rotary_dim));
  }
  if (config.linear_scaling) {
    for (double& frequency : frequencies_) frequency /= config.linear_scaling->factor;
  }
  if (!config.yarn) return;
  const YarnScaling& yarn = *config.yarn;
  const double low = std::max(
      std::floor(CorrectionDim(yarn.beta_fast, rotary_dim, config.rope_theta, yarn.original_max_position)),
      0.0);
  double high = std::min(
      std::ceil(CorrectionDim(yarn.beta_slow, rotary_dim, config.rope_theta, yarn.original_max_position)),
      rotary_dim - 1);
  if (low == high) high += 0.001;
  for (size_t i = 0; i < frequencies_.size(); ++i) {
    const double ramp = std::clamp((static_cast<double>(i) - low) / (high - low), 0.0, 1.0);
    frequencies_[i] = ramp * frequencies_[i] / yarn.factor + (1 - ramp) * frequencies_[i];
  }
  factor_ = yarn.attention_factor;
}

void Rope::Angles(int32_t position, float* cos, float* sin) const {
  for (size_t i = 0; i < frequencies_.size(); ++i) {
    const double angle = position * frequencies_[i];
    cos[i] = static_cast<float>(std::cos(angle) * factor_);
    sin[i] = static_cast<float>(std::sin(angle) * factor_);
  }
}

void Rope::Apply(const float* cos, const float* sin, float* head) const {
  const size_t half = frequencies_.size();
  for (size_t i = 0; i < half; ++i) {
    const float a = head[i];
    const float b = head[i + half];
    head[i] = a * cos[i] - b * sin[i];
    head[i + half] = b * cos[i] + a * sin[i];
  }
}

}  // namespace millrace::engine
