#include <math_constants.h>

#include "engine/backend/cuda/kernels/device.cuh"
#include "engine/backend/cuda/kernels/router.h"

namespace millrace::engine::cuda {
namespace {

constexpr int kWarpsPerBlock = 4;

// Unsigned keys in the order of the floats, so that one instruction reduces them over the warp.
__device__ uint32_t Key(float value) {
  const uint32_t bits = __float_as_uint(value);
  return bits ^ (static_cast<uint32_t>(static_cast<int32_t>(bits) >> 31) | 0x80000000u);
}
__device__ float FromKey(uint32_t key) {
  return __uint_as_float(key ^ ((key >> 31) != 0 ? 0x80000000u : 0xffffffffu));
}

// The lowest index among the lanes whose key is the largest; that key in `key`.
__device__ int WarpBest(uint32_t& key, int index) {
  const uint32_t largest = __reduce_max_sync(kFullWarp, key);
  const uint32_t candidate = key == largest ? static_cast<uint32_t>(index) : 0xffffffffu;
  key = largest;
  return static_cast<int>(__reduce_min_sync(kFullWarp, candidate));
}

// The sum of the two largest values of a group of the warp's choices.
__device__ float GroupScore(const float* choice, int group_size, int lane) {
  float first = -CUDART_INF_F;
  float second = -CUDART_INF_F;
  for (int i = lane; i < group_size; i += 32) {
    const float value = choice[i];
    second = fmaxf(second, fminf(first, value));
    first = fmaxf(first, value);
  }
  uint32_t key = Key(first);
  const int owner = WarpBest(key, lane);
  const uint32_t next = __reduce_max_sync(kFullWarp, Key(lane == owner ? second : first));
  return group_size > 1 ? FromKey(key) + FromKey(next) : FromKey(key);
}

// Bit g: group g is kept.
__device__ uint32_t KeptGroups(const SelectExpertsArgs& args, const float* choice, int lane) {
  const int group_size = args.num_experts / args.num_groups;
  float mine = -CUDART_INF_F;  // lane g holds group g's score
  for (int g = 0; g < args.num_groups; ++g) {
    const float score = GroupScore(choice + g * group_size, group_size, lane);
    if (lane == g) mine = score;
  }
  uint32_t kept = 0;
  for (int i = 0; i < args.groups_per_token; ++i) {
    uint32_t key = Key(mine);
    const int group = WarpBest(key, lane);
    kept |= 1u << group;
    if (lane == group) mine = -CUDART_INF_F;
  }
  return kept;
}

// The lane's experts are lane, lane + 32, ...
template <int kPerLane>
__device__ void Scores(const SelectExpertsArgs& args, const float* logits, int lane,
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

// Warp per token.
template <int kPerLane>
__global__ void __launch_bounds__(32 * kWarpsPerBlock) SelectExperts(SelectExpertsArgs args) {
  __shared__ float choices[kWarpsPerBlock][32 * kPerLane];
  const int lane = threadIdx.x % 32;
  const int row = blockIdx.x * kWarpsPerBlock + threadIdx.x / 32;
  if (row >= args.rows) return;
  const int64_t out = static_cast<int64_t>(row) * args.top_k + lane;
  if (row >= *args.valid_rows) {
    if (lane < args.top_k) {
      args.experts[out] = -1;
      args.weights[out] = 0;
    }
    return;
  }
  float score[kPerLane];
  Scores(args, args.logits + static_cast<int64_t>(row) * args.num_experts, lane, score);
  uint32_t choice[kPerLane];  // keys of what is still to choose from; 0: nothing
  float* const shared_choice = choices[threadIdx.x / 32];
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
  if (lane < args.top_k) {
    args.experts[out] = chosen;
    args.weights[out] = static_cast<float>(chosen_weight / divisor * args.scaling);
  }
}

constexpr int kSortWarps = 16;

// Block per expert: counts the choices of lower experts, which is where its slots begin, then writes its own
// in order. A warp owns a run of consecutive choices in both passes.
__global__ void __launch_bounds__(32 * kSortWarps) SortSlots(SortSlotsArgs args) {
  __shared__ int lower_counts[kSortWarps], own_counts[kSortWarps];
  const int rows = min(*args.valid_rows, args.rows);
  const int expert = blockIdx.x;
  const int slots = args.top_k + args.num_shared;
  const int experts_all = args.num_experts + args.num_shared;
  if (expert >= args.num_experts) {  // every token's
    const int shared = expert - args.num_experts;
    const int begin = rows * (args.top_k + shared);
    if (threadIdx.x == 0) {
      args.offsets[expert] = begin;
      if (expert == experts_all - 1) args.offsets[experts_all] = begin + rows;
    }
    for (int t = threadIdx.x; t < rows; t += 32 * kSortWarps) {
      args.slots[begin + t] = t * slots + args.top_k + shared;
      args.tokens[begin + t] = t;
      args.slot_weights[begin + t] = 1;
    }
    return;
  }
  const int lane = threadIdx.x % 32;
  const int warp = threadIdx.x / 32;
  const int count = rows * args.top_k;
  const int run = (count + 32 * kSortWarps - 1) / (32 * kSortWarps) * 32;
  const int begin = min(warp * run, count);
  const int end = min(begin + run, count);
  int lower = 0;
  int own = 0;
#pragma unroll 8
  for (int i = begin + lane; i < end; i += 32) {
    const int other = args.experts[i];
    lower += static_cast<uint32_t>(other) < static_cast<uint32_t>(expert);  // -1 is nobody's
    own += other == expert;
  }
  lower = __reduce_add_sync(kFullWarp, lower);
  own = __reduce_add_sync(kFullWarp, own);
  if (lane == 0) {
    lower_counts[warp] = lower;
    own_counts[warp] = own;
  }
  __syncthreads();  // counts of all warps
  int first = 0;    // of the expert
  int next = 0;     // of this warp's run, from there
  int all = 0;      // of the expert's slots
#pragma unroll
  for (int w = 0; w < kSortWarps; ++w) {
    first += lower_counts[w];
    all += own_counts[w];
    if (w < warp) next += own_counts[w];
  }
  if (threadIdx.x == 0) {
    args.offsets[expert] = first;
    if (expert == experts_all - 1) args.offsets[experts_all] = first + all;
  }
  next += first;
  if (own == 0) return;
#pragma unroll 4
  for (int base = begin; base < end; base += 32) {
    const int i = base + lane;
    const bool mine = i < end && args.experts[i] == expert;
    const unsigned ballot = __ballot_sync(kFullWarp, mine);
    if (mine) {
      const int at = next + __popc(ballot & ((1u << lane) - 1));
      const int token = i / args.top_k;
      args.slots[at] = token * slots + i - token * args.top_k;
      args.tokens[at] = token;
      args.slot_weights[at] = args.weights[i];
    }
    next += __popc(ballot);
  }
}

}  // namespace

cudaError_t LaunchSelectExperts(const SelectExpertsArgs& args, cudaStream_t stream) {
  if (args.rows == 0) return cudaSuccess;
  if (args.num_experts > kExpertsMax || args.top_k > kTopKMax || args.num_groups > kGroupsMax ||
      (args.num_groups > 0 && args.num_experts % args.num_groups != 0)) {
    return cudaErrorInvalidValue;
  }
  const int blocks = (args.rows + kWarpsPerBlock - 1) / kWarpsPerBlock;
  if (args.num_experts <= 256) {
    SelectExperts<8><<<blocks, 32 * kWarpsPerBlock, 0, stream>>>(args);
  } else {
    SelectExperts<kExpertsMax / 32><<<blocks, 32 * kWarpsPerBlock, 0, stream>>>(args);
  }
  return cudaGetLastError();
}

cudaError_t LaunchSortSlots(const SortSlotsArgs& args, cudaStream_t stream) {
  if (args.rows == 0) return cudaSuccess;
  SortSlots<<<args.num_experts + args.num_shared, 32 * kSortWarps, 0, stream>>>(args);
  return cudaGetLastError();
}

}  // namespace millrace::engine::cuda
