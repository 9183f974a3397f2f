#pragma once
// Rows of one head (kHeadDim bf16) in shared memory, in 16-byte chunks. Rows of a multiple of 128 bytes are
// swizzled, others padded by 16 bytes; either way the 8 rows of an ldmatrix fall on different banks.

#include <stdint.h>

namespace millrace::engine::cuda {

template <int kHeadDim>
struct HeadRows {
  static constexpr bool kSwizzled = kHeadDim % 64 == 0;
  static constexpr int kPitch = kHeadDim * 2 + (kSwizzled ? 0 : 16);  // bytes
  // Byte offset of chunk `chunk` of row `row`.
  static __device__ __forceinline__ uint32_t Offset(int row, int chunk) {
    return row * kPitch + ((kSwizzled ? chunk ^ (row & 7) : chunk) << 4);
  }
};

}  // namespace millrace::engine::cuda
