#pragma once
// Rows of bf16 to e4m3 with one fp32 scale per 128 elements: scale = largest magnitude / 448 (1 if all are
// zero), q = x / scale rounded to nearest even. Bound by bytes.

#include <cuda_bf16.h>
#include <cuda_runtime_api.h>
#include <stdint.h>

namespace millrace::engine::cuda {

struct QuantizeRowsArgs {
  int num_rows = 0;
  int k = 0;                         // a multiple of 128
  const __nv_bfloat16* x = nullptr;  // rows x_stride elements apart, 16-byte aligned
  int64_t x_stride = 0;
  uint8_t* q = nullptr;     // [num_rows][k] e4m3
  float* scales = nullptr;  // [num_rows][k / 128]
};

cudaError_t LaunchQuantizeRows(const QuantizeRowsArgs& args, cudaStream_t stream);

}  // namespace millrace::engine::cuda
