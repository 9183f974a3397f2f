#pragma once
// Adds the experts' outputs of a token to the residual stream and normalises it for what comes next. Fixed
// order of addition, so the result is the same on every run.

#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace millrace::engine::cuda {

struct CombineArgs {
  const __nv_bfloat16* expert_out =
      nullptr;  // [rows, slots_per_token, hidden], multiplied by the router's weights
  const int32_t* valid_rows =
      nullptr;                         // device scalar, older than the step: rows from here on are left alone
  float* residual = nullptr;           // [rows, hidden], added to
  const float* norm_weight = nullptr;  // [hidden], or null: no norm
  __nv_bfloat16* normed = nullptr;     // [rows, hidden], written with norm_weight
  int32_t rows = 0;
  int32_t slots_per_token = 0;
  int32_t hidden = 0;  // a multiple of 8
  float eps = 0;
};
cudaError_t LaunchCombine(const CombineArgs& args, cudaStream_t stream);

}  // namespace millrace::engine::cuda
