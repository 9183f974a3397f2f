#pragma once
// Bias, QK norm, rotary embedding and the write of K and V into their pages, in one pass over a step's QKV
// rows. Rows are independent; every head is normalised in fp32. Pages that no row names are not touched.

#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace millrace::engine::cuda {

struct QkRopeArgs {
  const __nv_bfloat16* qkv = nullptr;  // [rows, (heads + 2 * kv_heads) * head_dim]: all Q, all K, all V heads
  const float* bias = nullptr;         // of the same width, or null
  const float* query_norm = nullptr;   // [head_dim], or null: no QK norm
  const float* key_norm = nullptr;     // [head_dim], or null
  const float* rope = nullptr;         // [positions, 2 * pairs]: cos, then sin of each pair
  const int32_t* positions = nullptr;  // [rows], older than the step, as kv_slots
  const int32_t* kv_slots = nullptr;  // [rows] page * 64 + token in the page, or negative: K and V go nowhere
  __nv_bfloat16* query = nullptr;     // [rows, heads * head_dim], written; not scaled
  __nv_bfloat16* kv_layer = nullptr;  // this layer's pages, [page][k|v][kv head][64][head_dim]
  int32_t rows = 0;
  int32_t heads = 0;
  int32_t kv_heads = 0;
  int32_t head_dim = 0;  // a multiple of 8, at most 128
  int32_t pairs = 0;     // rotary_dim / 2, a multiple of 4
  float eps = 0;
};
cudaError_t LaunchQkRope(const QkRopeArgs& args, cudaStream_t stream);

}  // namespace millrace::engine::cuda
