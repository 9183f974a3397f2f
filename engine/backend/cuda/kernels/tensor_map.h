#pragma once
// Tensor maps for the copy engine, built on the host (cuTensorMapEncodeTiled, found through the runtime so
// that nothing links against the driver library). Cheap (microseconds); passed to kernels by value.

#include <cuda.h>
#include <cuda_runtime_api.h>
#include <stdint.h>

namespace millrace::engine::cuda {

// Five dimensions, fastest first. Boxes land in the 128-byte swizzle; the box's first dimension is 128 bytes.
struct TensorMapSpec {
  CUtensorMapDataType type = CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
  const void* base = nullptr;      // 16-byte aligned
  uint64_t sizes[5] = {};          // elements
  uint64_t strides_bytes[4] = {};  // of dimensions 1..4, multiples of 16
  uint32_t box[5] = {};            // elements, each at most 256
};

cudaError_t EncodeTensorMap(const TensorMapSpec& spec, CUtensorMap* map);

// Weights [experts][rows][k] as boxes of 64 k by `box_rows` rows (128 k with one-byte elements), coordinates
// {k, 0, 0, row / 16, expert}. Interleaved gate/up rows (2i gate, 2i+1 up) arrive as 8 gates, then their 8
// ups, and so on, which is what puts a gate and its up into the same thread of an mma. Rows and k beyond the
// end arrive as zeros.
cudaError_t EncodeExpertWeights(const void* weights, int element_bytes, int num_experts, int rows, int k,
                                int box_rows, bool interleaved, CUtensorMap* map);

}  // namespace millrace::engine::cuda
