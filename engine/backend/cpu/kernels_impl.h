#pragma once
// One source for every instruction set, in the compiler's own vector types: 16 floats are one AVX-512
// register, two AVX2 registers or four SSE registers. The including file picks the namespace and the flags.

#include <cstdint>
#include <cstring>

#include "engine/backend/cpu/kernels.h"

#ifndef MILLRACE_KERNEL_NAMESPACE
#error "include this from kernels_<isa>.cc"
#endif

namespace millrace::engine::MILLRACE_KERNEL_NAMESPACE {

using V16 = float __attribute__((vector_size(64)));
using U16x16 = uint16_t __attribute__((vector_size(32)));
using U32x16 = uint32_t __attribute__((vector_size(64)));

inline __attribute__((always_inline)) V16 Load(const float* p) {
  V16 v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}

inline __attribute__((always_inline)) V16 Load(const uint16_t* p) {
  U16x16 narrow;
  std::memcpy(&narrow, p, sizeof(narrow));
  const U32x16 wide = __builtin_convertvector(narrow, U32x16) << 16;
  V16 v;
  std::memcpy(&v, &wide, sizeof(v));
  return v;
}

inline __attribute__((always_inline)) float Widen(float x) { return x; }
inline __attribute__((always_inline)) float Widen(uint16_t x) {
  const uint32_t bits = static_cast<uint32_t>(x) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

// One strip for `kTokens` tokens: one accumulator chain per output.
template <typename W, int kTokens>
inline void GemmTile(const W* w, int32_t cols, const float* const* x, float* const* y, int32_t first_row,
                     int32_t rows) {
  V16 sums[kTokens] = {};
  for (int32_t k = 0; k < cols; ++k) {
    const V16 weights = Load(w + static_cast<int64_t>(k) * kStripRows);
    for (int t = 0; t < kTokens; ++t) sums[t] += weights * x[t][k];
  }
  for (int t = 0; t < kTokens; ++t) {
    std::memcpy(y[t] + first_row, &sums[t],
                sizeof(float) * static_cast<size_t>(rows < kStripRows ? rows : kStripRows));
  }
}

template <typename W>
void Gemm(const PackedMatrix& w, int32_t strip_begin, int32_t strip_end, const float* const* x,
          float* const* y, int32_t tokens) {
  for (int32_t strip = strip_begin; strip < strip_end; ++strip) {
    const W* data = static_cast<const W*>(w.data) + static_cast<int64_t>(strip) * w.cols * kStripRows;
    const int32_t row = strip * kStripRows;
    const int32_t rows = w.rows - row;
    int32_t t = 0;
    for (; t + 8 <= tokens; t += 8) GemmTile<W, 8>(data, w.cols, x + t, y + t, row, rows);
    if (t + 4 <= tokens) {
      GemmTile<W, 4>(data, w.cols, x + t, y + t, row, rows);
      t += 4;
    }
    if (t + 2 <= tokens) {
      GemmTile<W, 2>(data, w.cols, x + t, y + t, row, rows);
      t += 2;
    }
    if (t < tokens) GemmTile<W, 1>(data, w.cols, x + t, y + t, row, rows);
  }
}

template <typename T>
inline float Dot(const float* a, const T* b, int32_t count) {
  V16 sums = {};
  int32_t i = 0;
  for (; i + 16 <= count; i += 16) sums += Load(a + i) * Load(b + i);
  float sum = 0;
  for (int lane = 0; lane < 16; ++lane) sum += sums[lane];
  for (; i < count; ++i) sum += a[i] * Widen(b[i]);
  return sum;
}

// y += scale * x
template <typename T>
inline void AddScaled(float* y, const T* x, float scale, int32_t count) {
  int32_t i = 0;
  for (; i + 16 <= count; i += 16) {
    const V16 sum = Load(y + i) + Load(x + i) * scale;
    std::memcpy(y + i, &sum, sizeof(sum));
  }
  for (; i < count; ++i) y[i] += Widen(x[i]) * scale;
}

// Online softmax (Milakov and Gimelshein 2018), one page of 64 keys at a time.
template <typename T>
void Attend(const AttentionArgs& args) {
  constexpr int32_t kPage = 64;
  float max = -__builtin_inff();
  float sum = 0;
  for (int32_t d = 0; d < args.head_dim; ++d) args.output[d] = 0;
  for (int32_t first = 0; first < args.num_keys; first += kPage) {
    const char* piece = args.pages[first / kPage];
    const T* keys = reinterpret_cast<const T*>(piece + args.key_offset);
    const T* values = reinterpret_cast<const T*>(piece + args.value_offset);
    const int32_t count = args.num_keys - first < kPage ? args.num_keys - first : kPage;
    float scores[kPage];
    float page_max = max;
    for (int32_t i = 0; i < count; ++i) {
      scores[i] = Dot(args.query, keys + static_cast<int64_t>(i) * args.head_dim, args.head_dim);
      page_max = scores[i] > page_max ? scores[i] : page_max;
    }
    const float shrink = __builtin_expf(max - page_max);  // 0 for the first page
    sum *= shrink;
    for (int32_t d = 0; d < args.head_dim; ++d) args.output[d] *= shrink;
    for (int32_t i = 0; i < count; ++i) {
      const float weight = __builtin_expf(scores[i] - page_max);
      sum += weight;
      AddScaled(args.output, values + static_cast<int64_t>(i) * args.head_dim, weight, args.head_dim);
    }
    max = page_max;
  }
  for (int32_t d = 0; d < args.head_dim; ++d) args.output[d] /= sum;
}

inline void SwiGlu(float* gate, const float* up, int32_t count) {
  for (int32_t i = 0; i < count; ++i) gate[i] = gate[i] / (1.0f + __builtin_expf(-gate[i])) * up[i];
}

inline constexpr KernelTable MakeTable(const char* name) {
  return {name, Gemm<uint16_t>, Gemm<float>, Attend<uint16_t>, Attend<float>, SwiGlu};
}

}  // namespace millrace::engine::MILLRACE_KERNEL_NAMESPACE
