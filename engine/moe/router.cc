#include "engine/moe/router.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "base/check.h"

namespace millrace::engine {
namespace {

constexpr float kExcluded = -std::numeric_limits<float>::infinity();

void Sigmoid(std::span<const float> logits, std::span<float> scores) {
  for (size_t i = 0; i < logits.size(); ++i) scores[i] = 1.0f / (1.0f + std::exp(-logits[i]));
}

void Softmax(std::span<const float> logits, std::span<float> scores) {
  const float max = *std::max_element(logits.begin(), logits.end());
  double sum = 0;
  for (size_t i = 0; i < logits.size(); ++i) sum += scores[i] = std::exp(logits[i] - max);
  for (float& score : scores) score = static_cast<float>(score / sum);
}

// Index of the largest value, the lowest index among equals.
size_t Best(std::span<const float> values) {
  return static_cast<size_t>(std::max_element(values.begin(), values.end()) - values.begin());
}

// Excludes every expert outside the groups_per_token groups whose two best experts add up to most.
void LimitGroups(const RouterShape& shape, std::span<float> choice, std::span<float> group_scores) {
  const auto group_size = choice.size() / group_scores.size();
  for (size_t g = 0; g < group_scores.size(); ++g) {
    float first = kExcluded;
    float second = kExcluded;
    for (const float value : choice.subspan(g * group_size, group_size)) {
      if (value > first) {
        second = first;
        first = value;
      } else if (value > second) {
        second = value;
      }
    }
    group_scores[g] = group_size > 1 ? first + second : first;
  }
  // Kept groups are marked by taking their score away; what still has one is excluded.
  for (int32_t kept = 0; kept < shape.groups_per_token; ++kept) group_scores[Best(group_scores)] = kExcluded;
  for (size_t g = 0; g < group_scores.size(); ++g) {
    if (group_scores[g] == kExcluded) continue;
    for (float& value : choice.subspan(g * group_size, group_size)) value = kExcluded;
  }
}

}  // namespace

RouterShape MakeRouterShape(const ModelConfig& config) {
  RouterShape shape;
  shape.num_experts = config.num_experts;
  shape.experts_per_token = config.experts_per_token;
  shape.num_groups = config.num_groups;
  shape.groups_per_token = config.groups_per_token;
  shape.sigmoid = config.sigmoid_router;
  shape.norm_topk_prob = config.norm_topk_prob;
  shape.scaling = config.routed_scaling_factor;
  return shape;
}

void RouteToken(const RouterShape& shape, std::span<const float> logits, std::span<const float> bias,
                std::span<float> scratch, std::span<int32_t> ids, std::span<float> weights) {
  const auto experts = static_cast<size_t>(shape.num_experts);
  const auto top_k = static_cast<size_t>(shape.experts_per_token);
  MR_CHECK(logits.size() == experts && ids.size() == top_k && weights.size() == top_k);
  const std::span<float> scores = scratch.subspan(0, experts);
  const std::span<float> choice = scratch.subspan(experts, experts);
  shape.sigmoid ? Sigmoid(logits, scores) : Softmax(logits, scores);
  for (size_t e = 0; e < experts; ++e) choice[e] = scores[e] + (bias.empty() ? 0.0f : bias[e]);
  if (shape.num_groups > 0) {
    LimitGroups(shape, choice, scratch.subspan(2 * experts, static_cast<size_t>(shape.num_groups)));
  }
  double sum = 0;
  for (size_t slot = 0; slot < top_k; ++slot) {
    const size_t expert = Best(choice);
    ids[slot] = static_cast<int32_t>(expert);
    weights[slot] = scores[expert];
    sum += scores[expert];
    choice[expert] = kExcluded;
  }
  // The sigmoid models add an epsilon and always scale; the softmax models do neither.
  const bool normalise = shape.norm_topk_prob && top_k > 1;
  const double divisor = normalise ? sum + (shape.sigmoid ? 1e-20 : 0.0) : 1.0;
  for (float& weight : weights) weight = static_cast<float>(weight / divisor * shape.scaling);
}

}  // namespace millrace::engine
