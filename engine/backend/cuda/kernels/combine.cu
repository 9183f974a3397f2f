#include "engine/backend/cuda/kernels/combine.h"
#include "engine/backend/cuda/kernels/device.cuh"

namespace millrace::engine::cuda {
namespace {

constexpr int kThreads = 256;

// Block per row; a thread owns 8 columns at a time. Dynamic shared memory: the new residual row, [hidden]
// floats.
__global__ void __launch_bounds__(kThreads) Combine(CombineArgs args) {
  extern __shared__ float4 row4[];
  __shared__ float scratch[kThreads / 32];
  if (static_cast<int>(blockIdx.x) >= *args.valid_rows) return;
  const int64_t row = blockIdx.x;
  const auto* const in =
      reinterpret_cast<const Bf16x8*>(args.expert_out + row * args.slots_per_token * args.hidden);
  auto* const residual = reinterpret_cast<float4*>(args.residual + row * args.hidden);
  const int columns = args.hidden / 8;
  float squares = 0;
  for (int i = threadIdx.x; i < columns; i += kThreads) {
    float sum[8] = {};
    for (int j = 0; j < args.slots_per_token; ++j) {
      float wide[8];
      Widen(in[static_cast<int64_t>(j) * columns + i], wide);
#pragma unroll
      for (int c = 0; c < 8; ++c) sum[c] += wide[c];
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float4 v = residual[2 * i + half];
      v.x += sum[4 * half];
      v.y += sum[4 * half + 1];
      v.z += sum[4 * half + 2];
      v.w += sum[4 * half + 3];
      residual[2 * i + half] = v;
      row4[2 * i + half] = v;
      squares += v.x * v.x + v.y * v.y + v.z * v.z + v.w * v.w;
    }
  }
  if (args.norm_weight == nullptr) return;
  const float scale = rsqrtf(BlockSum(squares, scratch) / static_cast<float>(args.hidden) + args.eps);
  const auto* const weight = reinterpret_cast<const float4*>(args.norm_weight);
  auto* const out = reinterpret_cast<Bf16x8*>(args.normed + row * args.hidden);
  for (int i = threadIdx.x; i < columns; i += kThreads) {
    const float4 a = row4[2 * i], b = row4[2 * i + 1];
    const float4 v = weight[2 * i], w = weight[2 * i + 1];
    const float wide[8] = {a.x * scale * v.x, a.y * scale * v.y, a.z * scale * v.z, a.w * scale * v.w,
                           b.x * scale * w.x, b.y * scale * w.y, b.z * scale * w.z, b.w * scale * w.w};
    out[i] = Narrow(wide);
  }
}

}  // namespace

cudaError_t LaunchCombine(const CombineArgs& args, cudaStream_t stream) {
  if (args.rows == 0) return cudaSuccess;
  if (args.hidden % 8 != 0) return cudaErrorInvalidValue;
  Combine<<<args.rows, kThreads, args.hidden * sizeof(float), stream>>>(args);
  return cudaGetLastError();
}

}  // namespace millrace::engine::cuda
