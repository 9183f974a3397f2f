#pragma once
// Decode steps of one or two tokens wait for latency, not for bytes: these launches put all of a layer's
// dense weights in flight before the launch before them has ended, and do in one launch what larger batches
// do in four. A row's result does not depend on the other rows or on their number.

#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "engine/backend/cuda/kernels/grouped_gemm.h"
#include "engine/backend/cuda/kernels/router.h"

namespace millrace::engine::cuda {

inline constexpr int32_t kFewRowsMax = 2;
inline constexpr int32_t kFewRowsHiddenMax = 4096;  // of FewRowsRoute, whose rows lie in shared memory

// out[r] = weights x[r] (+ out[r] when `accumulate`), a warp per output: an fp32 sum per lane over its share
// of k, then over the lanes. The weights must be older than the step.
struct FewRowsGemmArgs {
  const __nv_bfloat16* weights = nullptr;  // [n, k], 16-byte aligned
  const __nv_bfloat16* x = nullptr;        // [rows, k], 16-byte aligned
  void* out = nullptr;                     // [rows, n] fp32 or bf16
  bool out_float = false;
  bool accumulate = false;
  int32_t rows = 0;  // at most kFewRowsMax
  int32_t n = 0;
  int32_t k = 0;  // a multiple of 8
};
cudaError_t LaunchFewRowsGemm(const FewRowsGemmArgs& args, cudaStream_t stream);

// RMSNorm, router product and choice of experts. The results are those of RmsNorm, a product and
// SelectExperts; the logits are summed as by FewRowsGemm.
struct FewRowsRouteArgs {
  const float* residual = nullptr;        // [rows, hidden]
  const float* norm_weight = nullptr;     // [hidden]
  const __nv_bfloat16* router = nullptr;  // [num_experts, hidden], older than the step
  __nv_bfloat16* normed = nullptr;        // [rows, hidden], written
  float* logits = nullptr;                // [rows, num_experts], written
  int32_t* blocks_done = nullptr;         // a zero in device memory; zero again after the launch
  SelectExpertsArgs select;               // all but the logits; valid_rows older than the step
  int32_t hidden = 0;                     // a multiple of 8, at most kFewRowsHiddenMax
  float eps = 0;
};
cudaError_t LaunchFewRowsRoute(const FewRowsRouteArgs& args, cudaStream_t stream);

// One of an expert layer's two products, per slot (router.h) and without sorting: a slot's expert is read
// whether or not another slot has read it. Values as of GroupedGemm with the same inputs (e4m3: quantised as
// by QuantizeRows), up to the order of the fp32 sums.
struct FewRowsExpertsArgs {
  ExpertMatrix matrix = ExpertMatrix::kDown;
  ExpertType type = ExpertType::kBf16;
  int32_t tokens = 0;  // at most kFewRowsMax
  int32_t top_k = 0;
  int32_t num_experts = 0;  // routed ones
  int32_t num_shared = 0;
  int32_t rows = 0;  // of weights per expert, as in GroupedGemmArgs; a multiple of 16 (e4m3: of 128)
  int32_t k = 0;     // a multiple of 8 (e4m3: of 128)
  const void* weights = nullptr;         // [experts][rows][k], older than the step, 16-byte aligned
  const float* weight_scales = nullptr;  // kE4m3, as in GroupedGemmArgs
  // As FewRowsRoute wrote them, at least two launches before a kDown launch and one before a kGateUp launch.
  const int32_t* experts = nullptr;       // [tokens, top_k]
  const float* expert_weights = nullptr;  // [tokens, top_k]
  const int32_t* valid_rows = nullptr;    // older than the step
  const __nv_bfloat16* x = nullptr;       // kGateUp: [tokens, k]; kDown: [slots, k]
  __nv_bfloat16* out = nullptr;  // [slots, rows / 2] or [slots, rows]; padding tokens' are not written
};
cudaError_t LaunchFewRowsExperts(const FewRowsExpertsArgs& args, cudaStream_t stream);

}  // namespace millrace::engine::cuda
