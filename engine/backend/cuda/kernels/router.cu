#include "engine/backend/cuda/kernels/launch.cuh"
#include "engine/backend/cuda/kernels/ptx.cuh"
#include "engine/backend/cuda/kernels/router.cuh"

namespace millrace::engine::cuda {
namespace {

constexpr int kWarpsPerBlock = 4;

// Warp per token.
template <int kPerLane>
__global__ void __launch_bounds__(32 * kWarpsPerBlock) SelectExperts(SelectExpertsArgs args) {
  __shared__ float choices[kWarpsPerBlock][32 * kPerLane];
  ptx::LetNextLaunchBegin();
  ptx::WaitForEarlierLaunches();
  const int lane = threadIdx.x % 32;
  const int row = blockIdx.x * kWarpsPerBlock + threadIdx.x / 32;
  if (row >= args.rows) return;
  int chosen = -1;
  float weight = 0;
  if (row < *args.valid_rows) {
    SelectRow<kPerLane>(args, args.logits + static_cast<int64_t>(row) * args.num_experts, lane,
                        choices[threadIdx.x / 32], chosen, weight);
  }
  if (lane < args.top_k) {
    const int64_t out = static_cast<int64_t>(row) * args.top_k + lane;
    args.experts[out] = chosen;
    args.weights[out] = weight;
  }
}

constexpr int kSortWarps = 16;

// Block per expert: counts the choices of lower experts, which is where its slots begin, then writes its own
// in order. A warp owns a run of consecutive choices in both passes.
__global__ void __launch_bounds__(32 * kSortWarps) SortSlots(SortSlotsArgs args) {
  __shared__ int lower_counts[kSortWarps], own_counts[kSortWarps];
  ptx::LetNextLaunchBegin();
  ptx::WaitForEarlierLaunches();
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
    return LaunchOverlapped(SelectExperts<8>, blocks, 32 * kWarpsPerBlock, 0, stream, args);
  }
  return LaunchOverlapped(SelectExperts<kExpertsMax / 32>, blocks, 32 * kWarpsPerBlock, 0, stream, args);
}

cudaError_t LaunchSortSlots(const SortSlotsArgs& args, cudaStream_t stream) {
  if (args.rows == 0) return cudaSuccess;
  return LaunchOverlapped(SortSlots, args.num_experts + args.num_shared, 32 * kSortWarps, 0, stream, args);
}

}  // namespace millrace::engine::cuda
