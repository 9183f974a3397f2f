#pragma once
// The work list of the grouped GEMMs, made by each CTA for itself in shared memory from the expert offsets:
// the tokens of an expert are cut into tiles of at most kTokens, and tiles are numbered through all experts.

#include <stdint.h>

namespace millrace::engine::cuda {

struct ExpertTile {
  int expert;
  int first_slot;
  int num_tokens;  // 1..kTokens
};

// Fills prefix[0..num_experts] with the number of the first tile of each expert (prefix[num_experts] = all).
// One warp calls; the caller synchronises the CTA before the others read.
template <int kTokens>
__device__ __forceinline__ void BuildExpertTiles(const int32_t* expert_offsets, int num_experts, int lane,
                                                 int32_t* prefix) {
  const int per_lane = (num_experts + 31) / 32;
  const int begin = min(lane * per_lane, num_experts);
  const int end = min(begin + per_lane, num_experts);
  int count = 0;
  for (int e = begin; e < end; ++e) {
    const int tiles = (expert_offsets[e + 1] - expert_offsets[e] + kTokens - 1) / kTokens;
    prefix[e] = count;  // relative to this lane's first expert; completed below
    count += tiles;
  }
  int sum = count;
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const int below = __shfl_up_sync(0xffffffffu, sum, step);
    if (lane >= step) sum += below;
  }
  const int base = sum - count;
  for (int e = begin; e < end; ++e) prefix[e] += base;
  if (lane == 31) prefix[num_experts] = sum;
}

// The tile of number `tile` < prefix[num_experts].
template <int kTokens>
__device__ __forceinline__ ExpertTile FindExpertTile(const int32_t* expert_offsets, int num_experts,
                                                     const int32_t* prefix, int tile) {
  int low = 0;
  int high = num_experts;  // prefix[low] <= tile < prefix[high]
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    if (prefix[middle] <= tile) {
      low = middle;
    } else {
      high = middle;
    }
  }
  ExpertTile found;
  found.expert = low;
  found.first_slot = expert_offsets[low] + (tile - prefix[low]) * kTokens;
  found.num_tokens = min(expert_offsets[low + 1] - found.first_slot, kTokens);
  return found;
}

}  // namespace millrace::engine::cuda
