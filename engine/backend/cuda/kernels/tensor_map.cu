#include "engine/backend/cuda/kernels/tensor_map.h"

namespace millrace::engine::cuda {
namespace {

using EncodeFunction = decltype(&cuTensorMapEncodeTiled);

// The driver's encoder, or nullptr if the driver is too old.
EncodeFunction FindEncoder() {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult result = cudaDriverEntryPointSymbolNotFound;
  if (cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault,
                                       &result) != cudaSuccess ||
      result != cudaDriverEntryPointSuccess) {
    return nullptr;
  }
  return reinterpret_cast<EncodeFunction>(function);
}

}  // namespace

cudaError_t EncodeTensorMap(const TensorMapSpec& spec, CUtensorMap* map) {
  static const EncodeFunction encode = FindEncoder();
  if (encode == nullptr) return cudaErrorNotSupported;
  const cuuint32_t element_strides[5] = {1, 1, 1, 1, 1};
  const CUresult result =
      encode(map, spec.type, 5, const_cast<void*>(spec.base), spec.sizes, spec.strides_bytes, spec.box,
             element_strides, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
             CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

cudaError_t EncodeExpertWeights(const void* weights, int element_bytes, int num_experts, int rows, int k,
                                int box_rows, bool interleaved, CUtensorMap* map) {
  const uint64_t pitch = static_cast<uint64_t>(k) * element_bytes;
  TensorMapSpec spec;
  spec.type = element_bytes == 2 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_UINT8;
  spec.base = weights;
  const uint64_t sizes[5] = {static_cast<uint64_t>(k), 8, 2, static_cast<uint64_t>(rows) / 16,
                             static_cast<uint64_t>(num_experts)};
  const uint64_t strides[4] = {interleaved ? 2 * pitch : pitch, interleaved ? pitch : 8 * pitch, 16 * pitch,
                               rows * pitch};
  const uint32_t box[5] = {static_cast<uint32_t>(128 / element_bytes), 8, 2,
                           static_cast<uint32_t>(box_rows) / 16, 1};
  for (int i = 0; i < 5; ++i) spec.sizes[i] = sizes[i];
  for (int i = 0; i < 4; ++i) spec.strides_bytes[i] = strides[i];
  for (int i = 0; i < 5; ++i) spec.box[i] = box[i];
  return EncodeTensorMap(spec, map);
}

}  // namespace millrace::engine::cuda
