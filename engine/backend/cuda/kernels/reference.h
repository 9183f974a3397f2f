#pragma once
// The plain form of the kernels that have a fast one: a thread block per output row, fp32 sums in ascending
// order. Tests compare the fast kernels with these on large shapes, where a CPU would take too long.

#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "engine/backend/cuda/kernels/grouped_gemm.h"

namespace millrace::engine::cuda {

// Causal attention over paged KV, any mix of decode and prefill rows.
struct AttentionReferenceArgs {
  const __nv_bfloat16* query = nullptr;     // [rows, heads, head_dim]
  const __nv_bfloat16* kv_layer = nullptr;  // [page][k|v][kv head][64][head_dim]
  const int32_t* num_keys = nullptr;        // [rows] keys that the row attends to; 0 gives zeros
  const int32_t* page_begin = nullptr;      // [rows] where the row's page table begins in `pages`
  const int32_t* pages = nullptr;
  __nv_bfloat16* out = nullptr;  // [rows, heads, head_dim]
  int32_t rows = 0;
  int32_t heads = 0;
  int32_t kv_heads = 0;
  int32_t head_dim = 0;  // at most 256
  float scale = 0;       // on query . key
};
cudaError_t LaunchAttentionReference(const AttentionReferenceArgs& args, cudaStream_t stream);

cudaError_t LaunchGroupedGemmReference(const GroupedGemmArgs& args, cudaStream_t stream);

}  // namespace millrace::engine::cuda
