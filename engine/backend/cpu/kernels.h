#pragma once
// The inner loops, one table per instruction set. Plain pointers and no containers: these files are compiled
// with wider flags than the rest, and nothing inline from a shared header may come out of them.

#include <cstdint>

namespace millrace::engine {

inline constexpr int32_t kStripRows = 16;

// Output rows in strips of 16: [ceil(rows / 16)][cols][16], the last strip padded with zero rows.
struct PackedMatrix {
  const void* data = nullptr;  // bf16 or fp32, 64-byte aligned
  int32_t rows = 0;
  int32_t cols = 0;
  int32_t strips() const { return (rows + kStripRows - 1) / kStripRows; }
};

struct AttentionArgs {
  const float* query;        // [head_dim], already scaled
  const char* const* pages;  // pages[i]: piece of the i-th page of this layer
  int64_t key_offset;        // of this kv head's K inside a piece, bytes
  int64_t value_offset;      // likewise V
  int32_t head_dim;
  int32_t num_keys;  // the query sees keys 0 .. num_keys - 1
  float* output;     // [head_dim]
};

struct KernelTable {
  const char* name;
  // y[t][r] = sum over k of x[t][k] * w[r][k], for rows of strips [strip_begin, strip_end) and t in [0,
  // tokens). Each output is summed over k in ascending order in one chain, whatever `tokens` is.
  void (*gemm_bf16)(const PackedMatrix& w, int32_t strip_begin, int32_t strip_end, const float* const* x,
                    float* const* y, int32_t tokens);
  void (*gemm_f32)(const PackedMatrix& w, int32_t strip_begin, int32_t strip_end, const float* const* x,
                   float* const* y, int32_t tokens);
  // Softmax over keys in fp32, page by page, so that the result depends on the keys alone.
  void (*attend_bf16)(const AttentionArgs& args);
  void (*attend_f32)(const AttentionArgs& args);
  // gate[i] = silu(gate[i]) * up[i]
  void (*swiglu)(float* gate, const float* up, int32_t count);
};

const KernelTable& PortableKernels();
const KernelTable& Avx2Kernels();
const KernelTable& Avx512Kernels();

}  // namespace millrace::engine
