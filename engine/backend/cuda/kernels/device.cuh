#pragma once
// What several kernels share: reductions over a warp or a block, and 16-byte accesses to bf16 rows.

#include <cuda_bf16.h>

#include <cstdint>

namespace millrace::engine::cuda {

using bf16 = __nv_bfloat16;

inline constexpr unsigned kFullWarp = 0xffffffffu;

// Butterfly: every lane gets the same sum, added in the same order whatever else runs.
__device__ inline float WarpSum(float value) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) value += __shfl_xor_sync(kFullWarp, value, offset);
  return value;
}

__device__ inline float WarpMax(float value) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) {
    value = fmaxf(value, __shfl_xor_sync(kFullWarp, value, offset));
  }
  return value;
}

// Sum over the block, in every thread. blockDim.x is a multiple of 32; `scratch` has a float per warp. Ends
// with all threads past their reads of `scratch`.
__device__ inline float BlockSum(float value, float* scratch) {
  value = WarpSum(value);
  if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = value;
  __syncthreads();  // scratch is written above, read below
  float sum = 0;
  for (unsigned warp = 0; warp < blockDim.x / 32; ++warp) sum += scratch[warp];
  __syncthreads();  // the caller may write scratch again
  return sum;
}

// Eight bf16 values in one 16-byte access; the address is a multiple of 16.
struct alignas(16) Bf16x8 {
  __nv_bfloat162 pair[4];
};

__device__ inline void Widen(const Bf16x8& narrow, float (&wide)[8]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float2 two = __bfloat1622float2(narrow.pair[i]);
    wide[2 * i] = two.x;
    wide[2 * i + 1] = two.y;
  }
}

__device__ inline Bf16x8 Narrow(const float (&wide)[8]) {
  Bf16x8 narrow;
#pragma unroll
  for (int i = 0; i < 4; ++i) narrow.pair[i] = __floats2bfloat162_rn(wide[2 * i], wide[2 * i + 1]);
  return narrow;
}

}  // namespace millrace::engine::cuda
