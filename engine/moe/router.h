#pragma once
// Expert selection, exactly as the Ling models define it. Plain, scalar, the same on every instruction set.

#include <cstdint>
#include <span>

#include "engine/model/config.h"

namespace millrace::engine {

struct RouterShape {
  int32_t num_experts = 0;
  int32_t experts_per_token = 0;
  int32_t num_groups = 0;  // 0 = no group limit
  int32_t groups_per_token = 0;
  bool sigmoid = false;
  bool norm_topk_prob = true;
  float scaling = 1;
};
RouterShape MakeRouterShape(const ModelConfig& config);

// logits: [num_experts] fp32, of one token; bias: [num_experts] or empty. Writes experts_per_token ids (in
// order of falling selection score, ties to the lowest id) and their weights. Chosen by biased score,
// weighted by the unbiased one; groups outside the kept ones are -inf, not 0. scratch: [2 * num_experts +
// num_groups] floats.
void RouteToken(const RouterShape& shape, std::span<const float> logits, std::span<const float> bias,
                std::span<float> scratch, std::span<int32_t> ids, std::span<float> weights);

}  // namespace millrace::engine
