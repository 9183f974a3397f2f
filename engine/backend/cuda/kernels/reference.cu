#include <math_constants.h>

#include "engine/backend/cuda/kernels/device.cuh"
#include "engine/backend/cuda/kernels/reference.h"

namespace millrace::engine::cuda {
namespace {

constexpr int kWarps = 4;
constexpr int kDimsPerLane = 8;  // head_dim <= 256
constexpr int kPageTokens = 64;

// Warp per (row, head), online softmax over the keys in order.
__global__ void __launch_bounds__(32 * kWarps) Attention(AttentionReferenceArgs args) {
  const int64_t task = int64_t{blockIdx.x} * kWarps + threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  if (task >= int64_t{args.rows} * args.heads) return;
  const int row = static_cast<int>(task / args.heads);
  const int head = static_cast<int>(task % args.heads);
  const int kv_head = head / (args.heads / args.kv_heads);
  const int64_t head_elements = int64_t{kPageTokens} * args.head_dim;
  float query[kDimsPerLane], sum[kDimsPerLane];
#pragma unroll
  for (int i = 0; i < kDimsPerLane; ++i) {
    const int d = lane + 32 * i;
    query[i] = d < args.head_dim ? __bfloat162float(args.query[task * args.head_dim + d]) * args.scale : 0.0f;
    sum[i] = 0;
  }
  float largest = -CUDART_INF_F;
  float total = 0;
  const int32_t* const pages = args.pages + args.page_begin[row];
  for (int key = 0; key < args.num_keys[row]; ++key) {
    const bf16* const k =
        args.kv_layer +
        (static_cast<int64_t>(pages[key / kPageTokens]) * 2 * args.kv_heads + kv_head) * head_elements +
        static_cast<int64_t>(key % kPageTokens) * args.head_dim;
    const bf16* const v = k + args.kv_heads * head_elements;
    float score = 0;
#pragma unroll
    for (int i = 0; i < kDimsPerLane; ++i) {
      const int d = lane + 32 * i;
      if (d < args.head_dim) score += query[i] * __bfloat162float(k[d]);
    }
    score = WarpSum(score);
    const float raised = fmaxf(largest, score);
    const float old_share = expf(largest - raised);
    const float share = expf(score - raised);
    total = total * old_share + share;
#pragma unroll
    for (int i = 0; i < kDimsPerLane; ++i) {
      const int d = lane + 32 * i;
      if (d < args.head_dim) sum[i] = sum[i] * old_share + share * __bfloat162float(v[d]);
    }
    largest = raised;
  }
#pragma unroll
  for (int i = 0; i < kDimsPerLane; ++i) {
    const int d = lane + 32 * i;
    if (d < args.head_dim) {
      args.out[task * args.head_dim + d] = __float2bfloat16_rn(total > 0 ? sum[i] / total : 0.0f);
    }
  }
}

__device__ float Dot(const bf16* a, const bf16* b, int k, int lane) {
  float sum = 0;
  for (int i = lane; i < k; i += 32) sum += __bfloat162float(a[i]) * __bfloat162float(b[i]);
  return WarpSum(sum);
}

// Block per slot, warp per output.
__global__ void __launch_bounds__(32 * kWarps) GroupedGemm(GroupedGemmArgs args) {
  const int slot = blockIdx.x;
  if (slot >= args.expert_offsets[args.num_experts]) return;
  int expert = 0;
  while (args.expert_offsets[expert + 1] <= slot) ++expert;
  const int lane = threadIdx.x % 32;
  const int64_t x_row = args.x_rows == nullptr ? slot : args.x_rows[slot];
  const int64_t out_row = args.out_rows == nullptr ? slot : args.out_rows[slot];
  const bf16* const x = static_cast<const bf16*>(args.x) + x_row * args.x_stride;
  const bf16* const weights =
      static_cast<const bf16*>(args.weights) + static_cast<int64_t>(expert) * args.rows * args.k;
  const bool gated = args.matrix == ExpertMatrix::kGateUp;
  for (int r = blockIdx.y * kWarps + threadIdx.x / 32; r < (gated ? args.rows / 2 : args.rows);
       r += gridDim.y * kWarps) {
    float value = 0;
    if (gated) {
      const float gate = Dot(weights + int64_t{2} * r * args.k, x, args.k, lane);
      const float up = Dot(weights + (int64_t{2} * r + 1) * args.k, x, args.k, lane);
      value = gate / (1.0f + expf(-gate)) * up;
    } else {
      value = Dot(weights + int64_t{r} * args.k, x, args.k, lane);
      if (args.slot_scale != nullptr) value *= args.slot_scale[slot];
    }
    if (lane == 0) args.out[out_row * args.out_stride + r] = __float2bfloat16_rn(value);
  }
}

}  // namespace

cudaError_t LaunchAttentionReference(const AttentionReferenceArgs& args, cudaStream_t stream) {
  if (args.rows == 0) return cudaSuccess;
  if (args.head_dim > 32 * kDimsPerLane) return cudaErrorInvalidValue;
  const int64_t tasks = int64_t{args.rows} * args.heads;
  Attention<<<static_cast<unsigned>((tasks + kWarps - 1) / kWarps), 32 * kWarps, 0, stream>>>(args);
  return cudaGetLastError();
}

cudaError_t LaunchGroupedGemmReference(const GroupedGemmArgs& args, cudaStream_t stream) {
  if (args.num_slots_max == 0) return cudaSuccess;
  GroupedGemm<<<dim3(static_cast<unsigned>(args.num_slots_max), 16), 32 * kWarps, 0, stream>>>(args);
  return cudaGetLastError();
}

}  // namespace millrace::engine::cuda
