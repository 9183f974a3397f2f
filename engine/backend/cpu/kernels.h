#pragma once
// The inner loops, one table per instruction set. Plain pointers and no containers: the files that implement
// it are compiled with wider flags than the rest, and nothing inline from a shared header may come out of
// them.

#include <cstdint>

namespace millrace::engine {

inline constexpr int32_t kStripRows = 16;
inline constexpr int32_t kGroupCols =
    64;  // columns that share a scale: of a weight row, and of an activation

enum class WeightFormat : int32_t { kF32, kBf16, kInt8, kInt4 };
inline constexpr int32_t kWeightFormats = 4;

// Output rows in strips of 16, one after another, the last strip padded with zero rows. Inside a strip:
//   f32   [cols][16]
//   bf16  [ceil(cols / 2)][16][2]
//   int8  [groups][16 quads][16 rows][4] bytes of w + 128; then [groups][16] bf16 scales
//   int4  [groups][8 quads][16 rows][4] bytes, w + 8 of quad q in the low half and of quad q + 8 in the high
//         half; then the scales
// A quad is 4 consecutive columns, a group 64. The unsigned byte is what the dot-product instructions want on
// the weights' side. MakePackedMatrix (packing.h) fills the derived fields.
struct PackedMatrix {
  const char* data = nullptr;  // 64-byte aligned
  WeightFormat format = WeightFormat::kF32;
  int32_t rows = 0;
  int32_t cols = 0;
  int32_t strips = 0;
  int32_t groups = 0;        // int8, int4
  int64_t strip_bytes = 0;   // a multiple of 64
  int64_t scale_offset = 0;  // of the scales inside a strip
};

// A quantised activation row: [groups * 64] int8, then [groups] of these. Padding columns are zero.
struct ActivationGroup {
  float scale;
  int32_t minus_sum;  // minus the sum of the group's 64 values: takes the weights' offset out again
};

// Weights times rows, for strips [strip_begin, strip_end). Each output is one chain of sums over the columns
// in ascending order (integer formats: exact inside a group, then one fp32 chain over the groups), whatever
// `tokens` and the strip range are.
struct GemmArgs {
  const PackedMatrix* w;
  int32_t strip_begin;
  int32_t strip_end;
  const void* const* x;  // per token: float[cols], or a quantised row for int8 and int4 weights
  float* const* y;       // strip s goes to y[t] + y_offset + 16 * (s - strip_begin)
  int64_t y_offset;
  const float* scale;  // null: y = w x. Else y += scale[t] * (w x)
  int32_t tokens;
  const char* next;  // strips of the same matrix shape that this thread reads next, to prefetch; or null
};

// One (kv head, block of queries) over pages [page_begin, page_end): softmax numerators only. Queries are
// ordered by num_keys.
struct AttentionArgs {
  const float* const* queries;  // [num_queries] of [head_dim], already scaled
  const int32_t* num_keys;      // [num_queries]: the query sees keys 0 .. num_keys - 1 of the sequence
  const char* const* pages;     // pages[i]: piece of the i-th page of this layer
  int64_t key_offset;           // of this kv head's K inside a piece, bytes
  int64_t value_offset;         // likewise V
  int32_t head_dim;
  int32_t num_queries;  // at most kAttentionQueries
  int32_t page_begin;
  int32_t page_end;
  float* partials;  // [num_queries][head_dim + 2]: sum of weight * value, then largest score, then sum of
                    // weights
  float* scratch;   // [head_dim * 64 + kAttentionQueries * 65]
};
inline constexpr int32_t kAttentionQueries = 64;

struct KernelTable {
  const char* name;
  void (*gemm[kWeightFormats])(const GemmArgs& args);  // by WeightFormat
  // Online softmax, page by page, so that a query's result depends on its keys and the page range alone.
  void (*attend_bf16)(const AttentionArgs& args);
  void (*attend_f32)(const AttentionArgs& args);
  // into = the partial of both ranges together; `into` is the earlier range.
  void (*merge)(float* into, const float* partial, int32_t head_dim);
  // out = x / sqrt(mean(x^2) + eps) * weight; may be in place. Statistics in double, the same on every set.
  void (*rms_norm)(const float* x, const float* weight, int32_t count, float eps, float* out);
  // Writes a quantised row of ceil(count / 64) groups; `groups` points at the row's ActivationGroups.
  void (*quantize)(const float* x, int32_t count, int8_t* values, ActivationGroup* groups);
  // gate_up: [count / 16][gate 16, up 16]; out[i] = silu(gate[i]) * up[i]. count is a multiple of 16.
  void (*swiglu)(const float* gate_up, int32_t count, float* out);
  // y += scale * x, with the rounding of a gemm's `scale`.
  void (*add_scaled)(const float* x, float scale, int32_t count, float* y);
  // One group of 16 rows of weights, rows[r][64], into its place in a strip: 1024 or 512 bytes of codes and
  // 16 bf16 scales, the same on every set. A row with an infinity or a NaN becomes zeros.
  void (*pack_int8)(const float* const* rows, char* codes, uint16_t* scales);
  void (*pack_int4)(const float* const* rows, char* codes, uint16_t* scales);
};

const KernelTable& PortableKernels();
const KernelTable& Avx2Kernels();    // needs AVX2, FMA, F16C
const KernelTable& Avx512Kernels();  // needs AVX-512 F, BW, VL, DQ and VNNI
// The same with AMX tiles for integer products of more than a few tokens. Needs AVX-512 with VNNI, AMX with
// int8, and the kernel's permission for this process, which AskForAmx asks for.
const KernelTable& AmxKernels();
bool AskForAmx();
// The first three, the best that this processor has. Not AMX: with few tokens per expert it is slower.
const KernelTable& BestKernels();

}  // namespace millrace::engine
