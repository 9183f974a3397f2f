#pragma once
// The choice of a token's experts by one warp: what LaunchSelectExperts and the routing of a few rows share.

#include <math_constants.h>

#include "engine/backend/cuda/kernels/device.cuh"
#include "engine/backend/cuda/kernels/router.h"

namespace millrace::engine::cuda {

// Unsigned keys in the order of the floats, so that one instruction reduces them over the warp.
__device__ __forceinline__ uint32_t Key(float value) {
  const uint32_t bits = __float_as_uint(value);
  return bits ^ (static_cast<uint32_t>(static_cast<int32_t>(bits) >> 31) | 0x80000000u);
}
__device__ __forceinline__ float FromKey(uint32_t key) {
  return __uint_as_float(key ^ ((key >> 31) != 0 ? 0x80000000u : 0xffffffffu));
}

// The lowest index among the lanes whose key is the largest; that key in `key`.
__device__ __forceinline__ int WarpBest(uint32_t& key, int index) {
  const uint32_t largest = __reduce_max_sync(kFullWarp, key);
  const uint32_t candidate = key == largest ? static_cast<uint32_t>(index) : 0xffffffffu;
  key = largest;
  return static_cast<int>(__reduce_min_sync(kFullWarp, candidate));
}

// Bit g: group g is kept. A group's score is the sum of the two largest of the warp's choices in it; groups
// are scored side by side, each by as many lanes as there are for it.
__device__ __forceinline__ uint32_t KeptGroups(const SelectExpertsArgs& args, const float* choice, int lane) {
  const int group_size = args.num_experts / args.num_groups;
  int lanes = 32;  // of a group: a power of two
  while (lanes > 1 && lanes * args.num_groups > 32) lanes /= 2;
  const int group = lane / lanes;
  float first = -CUDART_INF_F;
  float second = -CUDART_INF_F;
  if (group < args.num_groups) {
    for (int i = lane % lanes; i < group_size; i += lanes) {
      const float value = choice[group * group_size + i];
      second = fmaxf(second, fminf(first, value));
      first = fmaxf(first, value);
    }
  }
  for (int step = 1; step < lanes; step *= 2) {
    const float other_first = __shfl_xor_sync(kFullWarp, first, step);
    const float other_second = __shfl_xor_sync(kFullWarp, second, step);
    second = fmaxf(fminf(first, other_first), fmaxf(second, other_second));
    first = fmaxf(first, other_first);
  }
  float mine = group_size > 1 ? first + second : first;
  if (group >= args.num_groups) mine = -CUDART_INF_F;
  uint32_t kept = 0;
  for (int i = 0; i < args.groups_per_token; ++i) {
    uint32_t key = Key(mine);
    const int best = WarpBest(key, group);
    kept |= 1u << best;
    if (group == best) mine = -CUDART_INF_F;
  }
  return kept;
}

// The lane's experts are lane, lane + 32, ...
template <int kPerLane>
__device__ __forceinline__ void Scores(const SelectExpertsArgs& args, const float* logits, int lane,
                                       float (&score)[kPerLane]) {
  float largest = -CUDART_INF_F;
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    const int e = lane + 32 * i;
    score[i] = e < args.num_experts ? logits[e] : -CUDART_INF_F;
    largest = fmaxf(largest, score[i]);
  }
  if (args.sigmoid) {
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) score[i] = 1.0f / (1.0f + expf(-score[i]));
    return;
  }
  largest = WarpMax(largest);
  float sum = 0;
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) sum += score[i] = expf(score[i] - largest);
  sum = WarpSum(sum);
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) score[i] /= sum;
}

// Lane j gets the token's j-th choice and its weight. The whole warp calls; `shared_choice`: [num_experts]
// floats of shared memory.
template <int kPerLane>
__device__ __forceinline__ void SelectRow(const SelectExpertsArgs& args, const float* logits, int lane,
                                          float* shared_choice, int& chosen_expert, float& weight_of_choice) {
  float score[kPerLane];
  Scores(args, logits, lane, score);
  uint32_t choice[kPerLane];  // keys of what is still to choose from; 0: nothing
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    const int e = lane + 32 * i;
    choice[i] = 0;
    if (e >= args.num_experts) continue;
    const float biased = score[i] + (args.bias == nullptr ? 0.0f : args.bias[e]);
    choice[i] = Key(biased);
    shared_choice[e] = biased;
  }
  __syncwarp();  // groups are read across lanes
  if (args.num_groups > 0) {
    const uint32_t kept = KeptGroups(args, shared_choice, lane);
    const int group_size = args.num_experts / args.num_groups;
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      const int e = lane + 32 * i;
      if (e < args.num_experts && (kept >> (e / group_size) & 1) == 0) choice[i] = Key(-CUDART_INF_F);
    }
  }
  double sum = 0;
  float chosen_weight = 0;  // lane j keeps the j-th choice
  int chosen = 0;
  for (int j = 0; j < args.top_k; ++j) {
    uint32_t best = choice[0];
    int expert = lane;
#pragma unroll
    for (int i = 1; i < kPerLane; ++i) {
      if (choice[i] <= best) continue;
      best = choice[i];
      expert = lane + 32 * i;
    }
    expert = WarpBest(best, expert);
    float weight = 0;
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      if (lane + 32 * i != expert) continue;
      weight = score[i];
      choice[i] = Key(-CUDART_INF_F);
    }
    weight = __shfl_sync(kFullWarp, weight, expert % 32);
    sum += weight;
    if (lane == j) {
      chosen = expert;
      chosen_weight = weight;
    }
  }
  const bool normalise = args.norm_topk_prob && args.top_k > 1;
  const double divisor = normalise ? sum + (args.sigmoid ? 1e-20 : 0.0) : 1.0;
  chosen_expert = chosen;
  weight_of_choice = static_cast<float>(chosen_weight / divisor * args.scaling);
}

}  // namespace millrace::engine::cuda
