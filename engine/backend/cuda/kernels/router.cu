#include <math_constants.h>

#include "engine/backend/cuda/kernels/device.cuh"
#include "engine/backend/cuda/kernels/router.h"

namespace millrace::engine::cuda {
namespace {

constexpr int kWarpsPerBlock = 4;
constexpr int kPerLane = kExpertsMax / 32;

// The lane's candidate against the other lanes': the larger value, the lower index among equals.
__device__ void WarpBest(float& value, int& index) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) {
    const float other = __shfl_xor_sync(kFullWarp, value, offset);
    const int other_index = __shfl_xor_sync(kFullWarp, index, offset);
    if (other > value || (other == value && other_index < index)) {
      value = other;
      index = other_index;
    }
  }
}

// The two largest values of a group of the warp's choices.
__device__ float GroupScore(const float* choice, int group_size, int lane) {
  float first = -CUDART_INF_F;
  float second = -CUDART_INF_F;
  for (int i = lane; i < group_size; i += 32) {
    const float value = choice[i];
    second = fmaxf(second, fminf(first, value));
    first = fmaxf(first, value);
  }
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) {
    const float other_first = __shfl_xor_sync(kFullWarp, first, offset);
    const float other_second = __shfl_xor_sync(kFullWarp, second, offset);
    second = fmaxf(fminf(first, other_first), fmaxf(second, other_second));
    first = fmaxf(first, other_first);
  }
  return group_size > 1 ? first + second : first;
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
    float best = mine;
    int group = lane;
    WarpBest(best, group);
    kept |= 1u << group;
    if (lane == group) mine = -CUDART_INF_F;
  }
  return kept;
}

// The lane's experts are lane, lane + 32, ...
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
__global__ void __launch_bounds__(32 * kWarpsPerBlock) SelectExperts(SelectExpertsArgs args) {
  __shared__ float choices[kWarpsPerBlock][kExpertsMax];
  const int lane = threadIdx.x % 32;
  const int row = blockIdx.x * kWarpsPerBlock + threadIdx.x / 32;
  if (row >= args.rows) return;
  const int slots = args.top_k + args.num_shared;
  int32_t* const experts = args.experts + static_cast<int64_t>(row) * slots;
  float* const weights = args.weights + static_cast<int64_t>(row) * slots;
  if (row >= *args.valid_rows) {
    for (int j = lane; j < slots; j += 32) {
      experts[j] = -1;
      weights[j] = 0;
    }
    return;
  }
  float score[kPerLane];
  Scores(args, args.logits + static_cast<int64_t>(row) * args.num_experts, lane, score);
  float choice[kPerLane];  // what is still to choose from
  float* const shared_choice = choices[threadIdx.x / 32];
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    const int e = lane + 32 * i;
    choice[i] = -CUDART_INF_F;
    if (e >= args.num_experts) continue;
    choice[i] = score[i] + (args.bias == nullptr ? 0.0f : args.bias[e]);
    shared_choice[e] = choice[i];
  }
  __syncwarp();  // groups are read across lanes
  if (args.num_groups > 0) {
    const uint32_t kept = KeptGroups(args, shared_choice, lane);
    const int group_size = args.num_experts / args.num_groups;
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      const int e = lane + 32 * i;
      if (e < args.num_experts && (kept >> (e / group_size) & 1) == 0) choice[i] = -CUDART_INF_F;
    }
  }
  double sum = 0;
  float chosen_weight = 0;  // lane j keeps the j-th choice
  int chosen = 0;
  for (int j = 0; j < args.top_k; ++j) {
    float best = -CUDART_INF_F;
    int expert = kExpertsMax + lane;  // above every real id, so that an id wins when all is excluded
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      if (lane + 32 * i < args.num_experts && (choice[i] > best || expert >= kExpertsMax)) {
        best = choice[i];
        expert = lane + 32 * i;
      }
    }
    WarpBest(best, expert);
    float weight = 0;
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      if (lane + 32 * i != expert) continue;
      weight = score[i];
      choice[i] = -CUDART_INF_F;
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
    experts[lane] = chosen;
    weights[lane] = static_cast<float>(chosen_weight / divisor * args.scaling);
  } else if (lane < slots) {
    experts[lane] = args.num_experts + lane - args.top_k;
    weights[lane] = 1;
  }
}

constexpr int kSortThreads = 256;

__device__ void Place(const SortSlotsArgs& args, int at, int slot, int token) {
  args.slots[at] = slot;
  args.tokens[at] = token;
  args.slot_weights[at] = args.weights[slot];
}

// Block per expert: counts the choices of lower experts, which is where its slots begin, then writes its own
// in order.
__global__ void __launch_bounds__(kSortThreads) SortSlots(SortSlotsArgs args) {
  __shared__ int warp_counts[kSortThreads / 32];
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
    for (int t = threadIdx.x; t < rows; t += kSortThreads) {
      Place(args, begin + t, t * slots + args.top_k + shared, t);
    }
    return;
  }
  const int lane = threadIdx.x % 32;
  const int warp = threadIdx.x / 32;
  const int count = rows * args.top_k;
  int lower = 0;
  for (int i = threadIdx.x; i < count; i += kSortThreads) {
    lower += args.experts[i / args.top_k * slots + i % args.top_k] < expert;
  }
  for (int offset = 16; offset > 0; offset /= 2) lower += __shfl_xor_sync(kFullWarp, lower, offset);
  if (lane == 0) warp_counts[warp] = lower;
  __syncthreads();  // counts of all warps
  int next = 0;
  for (int w = 0; w < kSortThreads / 32; ++w) next += warp_counts[w];
  if (threadIdx.x == 0) {
    args.offsets[expert] = next;
    if (expert == experts_all - 1) args.offsets[experts_all] = count;
  }
  for (int base = 0; base < count; base += kSortThreads) {
    const int i = base + threadIdx.x;
    const int slot = i / args.top_k * slots + i % args.top_k;
    const bool mine = i < count && args.experts[slot] == expert;
    const unsigned ballot = __ballot_sync(kFullWarp, mine);
    __syncthreads();  // warp_counts of the round before are read
    if (lane == 0) warp_counts[warp] = __popc(ballot);
    __syncthreads();  // counts of all warps
    int before = next;
    for (int w = 0; w < kSortThreads / 32; ++w) {
      if (w < warp) before += warp_counts[w];
      next += warp_counts[w];
    }
    if (mine) Place(args, before + __popc(ballot & ((1u << lane) - 1)), slot, i / args.top_k);
  }
}

}  // namespace

cudaError_t LaunchSelectExperts(const SelectExpertsArgs& args, cudaStream_t stream) {
  if (args.rows == 0) return cudaSuccess;
  if (args.num_experts > kExpertsMax || args.top_k + args.num_shared > 32 || args.top_k > kTopKMax ||
      args.num_groups > kGroupsMax || (args.num_groups > 0 && args.num_experts % args.num_groups != 0)) {
    return cudaErrorInvalidValue;
  }
  SelectExperts<<<(args.rows + kWarpsPerBlock - 1) / kWarpsPerBlock, 32 * kWarpsPerBlock, 0, stream>>>(args);
  return cudaGetLastError();
}

cudaError_t LaunchSortSlots(const SortSlotsArgs& args, cudaStream_t stream) {
  if (args.rows == 0) return cudaSuccess;
  SortSlots<<<args.num_experts + args.num_shared, kSortThreads, 0, stream>>>(args);
  return cudaGetLastError();
}

}  // namespace millrace::engine::cuda
