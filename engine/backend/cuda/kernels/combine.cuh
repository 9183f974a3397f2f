#pragma once
// One row of the residual stream at the end of an MoE layer: what Combine and the combine of several ranks
// share.

#include "engine/backend/cuda/kernels/device.cuh"

namespace millrace::engine::cuda {

inline constexpr int kCombineThreads = 256;

// The weights of a norm, those of a thread's first columns (8 threadIdx.x ..) in registers, so that they can
// be asked for before what they multiply is there. `weight` null: no norm.
template <int kThreads>
struct NormWeights {
  const float4* weight;
  float4 first[2];
  __device__ __forceinline__ NormWeights(const float* weights, int hidden)
      : weight(reinterpret_cast<const float4*>(weights)) {
    const int at = 2 * min(static_cast<int>(threadIdx.x), hidden / 8 - 1);
    if (weight != nullptr) {
      first[0] = __ldg(weight + at);
      first[1] = __ldg(weight + at + 1);
    }
  }
  // Of columns 8 i + 4 half ..
  __device__ __forceinline__ float4 At(int i, int half) const {
    return i < kThreads ? first[half] : __ldg(weight + 2 * i + half);
  }
};

// residual += the row that `add` makes, then normed = RMSNorm(residual) unless there are no weights of it.
// The whole block calls. add(i, sum) adds columns 8 i .. 8 i + 7 to `sum`; a thread owns 8 columns at a time.
// `row4`: shared memory, [hidden] floats; `scratch`: shared memory, a float per warp.
template <typename Add>
__device__ __forceinline__ void CombineRow(float* residual_row, const NormWeights<kCombineThreads>& norm,
                                           bf16* normed_row, int hidden, float eps, float4* row4,
                                           float* scratch, const Add& add) {
  auto* const residual = reinterpret_cast<float4*>(residual_row);
  const int columns = hidden / 8;
  float squares = 0;
  for (int i = threadIdx.x; i < columns; i += kCombineThreads) {
    float sum[8] = {};
    add(i, sum);
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
  if (norm.weight == nullptr) return;
  const float scale = rsqrtf(BlockSum(squares, scratch) / static_cast<float>(hidden) + eps);
  auto* const out = reinterpret_cast<Bf16x8*>(normed_row);
  for (int i = threadIdx.x; i < columns; i += kCombineThreads) {
    const float4 a = row4[2 * i], b = row4[2 * i + 1];
    const float4 v = norm.At(i, 0), w = norm.At(i, 1);
    const float wide[8] = {a.x * scale * v.x, a.y * scale * v.y, a.z * scale * v.z, a.w * scale * v.w,
                           b.x * scale * w.x, b.y * scale * w.y, b.z * scale * w.z, b.w * scale * w.w};
    out[i] = Narrow(wide);
  }
}

__device__ __forceinline__ void AddTo(float (&sum)[8], const Bf16x8& row) {
  float wide[8];
  Widen(row, wide);
#pragma unroll
  for (int c = 0; c < 8; ++c) sum[c] += wide[c];
}

}  // namespace millrace::engine::cuda
