#pragma once
// Causal attention of the queries of several sequences (segments), each a chunk at the end of its context,
// over paged keys and values that already hold the chunk's own. Bound by the tensor cores.
//
// Query i of a segment of n queries and kv length L stands at position L - n + i and attends to positions up
// to its own. Keys are folded in ascending tiles at fixed positions from 0, so that the output of a query
// does not depend on how its sequence was cut into chunks, nor on the other segments.
//
// LaunchPrefillAttention picks by head_dim: 128 runs on wgmma (PrefillAttentionWgmma), 96, 64 and 32 on
// mma.sync (PrefillAttentionMma, which also takes 128: tests compare the two). Needs sm_90a. Launch returns
// the first CUDA error (cudaErrorInvalidValue: no such instance); it allocates nothing and synchronises
// nothing.

#include <cuda_bf16.h>
#include <cuda_runtime_api.h>
#include <stdint.h>

namespace millrace::engine::cuda {

struct PrefillAttentionArgs {
  int num_segments = 0;
  int num_tokens = 0;  // queries of all segments; at least q_begin[num_segments]
  int num_q_heads = 0;
  int num_kv_heads = 0;
  int head_dim = 0;
  float scale = 0;  // of the scores: 1 / sqrt(head_dim)

  const __nv_bfloat16* q =
      nullptr;           // [num_tokens][num_q_heads][head_dim], rows q_stride elements apart; 16-byte aligned
  int64_t q_stride = 0;  // a multiple of 8
  const int32_t* q_begin = nullptr;     // [num_segments + 1] first query row of each segment
  const int32_t* kv_lengths = nullptr;  // [num_segments] tokens of context, the chunk's included
  const __nv_bfloat16* kv =
      nullptr;        // this layer's pages, [page][k|v][kv head][64][head_dim] (engine/kv/layout.h)
  int num_pages = 0;  // pages behind kv
  const int32_t* page_table = nullptr;  // [num_segments][page_table_stride] page of tokens 64 i .. 64 i + 63
  int64_t page_table_stride = 0;
  __nv_bfloat16* out = nullptr;  // [num_tokens][num_q_heads][head_dim], rows out_stride elements apart
  int64_t out_stride = 0;        // even
};

cudaError_t LaunchPrefillAttention(const PrefillAttentionArgs& args, cudaStream_t stream);
cudaError_t LaunchPrefillAttentionMma(const PrefillAttentionArgs& args, cudaStream_t stream);
cudaError_t LaunchPrefillAttentionWgmma(const PrefillAttentionArgs& args, cudaStream_t stream);

}  // namespace millrace::engine::cuda
