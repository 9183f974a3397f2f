#pragma once
// Attention of one new token per sequence over its paged keys and values (split-KV, query heads of a group
// packed into one mma tile). Bound by the bytes of K and V.
//
// The cut of a sequence into splits depends on its own length only, and splits are merged in ascending order,
// so that a sequence's output does not depend on the batch it is in. Lengths and page tables are read on the
// device: a captured graph may be replayed with others.
//
// The launch may begin before the kernel before it in the stream ends: that one may still be writing q and
// the last page of each sequence, but not lengths, page tables or other pages.
//
// Instances: head_dim 128, 96, 64, 32; num_q_heads / num_kv_heads up to 8. Needs sm_90a. Launch returns the
// first CUDA error (cudaErrorInvalidValue: no such instance); it allocates nothing and synchronises nothing.

#include <cuda_bf16.h>
#include <cuda_runtime_api.h>
#include <stddef.h>
#include <stdint.h>

namespace millrace::engine::cuda {

inline constexpr int kDecodeAttentionSeqsMax = 1024;

struct DecodeAttentionArgs {
  int num_seqs = 0;  // at most kDecodeAttentionSeqsMax
  int num_q_heads = 0;
  int num_kv_heads = 0;
  int head_dim = 0;
  float scale = 0;  // of the scores: 1 / sqrt(head_dim)

  const __nv_bfloat16* q = nullptr;  // [num_seqs][num_q_heads][head_dim], sequences q_stride elements apart
  int64_t q_stride = 0;              // even
  const __nv_bfloat16* kv =
      nullptr;  // this layer's pages, [page][k|v][kv head][64][head_dim] (engine/kv/layout.h)
  const int32_t* page_table = nullptr;  // [num_seqs][page_table_stride] page of tokens 64 i .. 64 i + 63
  int64_t page_table_stride = 0;
  const int32_t* lengths = nullptr;  // [num_seqs] tokens to attend to, the new one included; 0: output zeros
  __nv_bfloat16* out = nullptr;      // [num_seqs][num_q_heads][head_dim], sequences out_stride elements apart
  int64_t out_stride = 0;            // even

  // DecodeAttentionWorkspaceBytes bytes, 16-byte aligned, zeroed once before the first launch. One launch at
  // a time may use it; each leaves it ready for the next.
  void* workspace = nullptr;
};

size_t DecodeAttentionWorkspaceBytes(int num_seqs_max, int num_q_heads, int num_kv_heads, int head_dim);

cudaError_t LaunchDecodeAttention(const DecodeAttentionArgs& args, cudaStream_t stream);

}  // namespace millrace::engine::cuda
