#pragma once
// Block quantisation to e4m3 inside a kernel: what LaunchQuantizeRows and the dispatch to other ranks share,
// so that both give the same codes.

#include "engine/backend/cuda/kernels/device.cuh"

namespace millrace::engine::cuda {

// 128 values over 16 neighbouring lanes, 8 in each; all lanes of the warp call. Returns the lane's codes,
// lowest byte first, and the scale of the block (value = code * scale).
__device__ __forceinline__ uint2 QuantizeBlock(const float (&values)[8], float& scale) {
  constexpr float kE4m3Max = 448.0f;
  float largest = 0;
#pragma unroll
  for (int i = 0; i < 8; ++i) largest = fmaxf(largest, fabsf(values[i]));
#pragma unroll
  for (int step = 1; step < 16; step *= 2)
    largest = fmaxf(largest, __shfl_xor_sync(kFullWarp, largest, step));
  scale = largest > 0 ? largest / kE4m3Max : 1.0f;
  uint32_t packed[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    uint16_t halves[2];
#pragma unroll
    for (int j = 0; j < 2; ++j) {  // the first operand goes to the high byte
      const float* pair = values + 4 * i + 2 * j;
      asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;"
          : "=h"(halves[j])
          : "f"(pair[1] / scale), "f"(pair[0] / scale));
    }
    packed[i] = halves[0] | static_cast<uint32_t>(halves[1]) << 16;
  }
  return make_uint2(packed[0], packed[1]);
}

}  // namespace millrace::engine::cuda
