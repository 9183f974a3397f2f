#pragma once
// Everything but the integer products and attention, one source for every instruction set. The including file
// picks the namespace, the tile sizes and the flags.

#include "engine/backend/cpu/attention_impl.h"
#include "engine/backend/cpu/kernels.h"
#include "engine/backend/cpu/vector.h"

namespace millrace::engine::MILLRACE_KERNEL_NAMESPACE {

// Columns k and k + 1 (when `two`) of a strip, widened.
template <typename W>
struct ColumnPair;
template <>
struct ColumnPair<float> {
  static constexpr int64_t kBytes = 128;
  static MILLRACE_INLINE void Read(const char* at, V16* first, V16* second, bool two) {
    *first = Load(reinterpret_cast<const float*>(at));
    if (two) *second = Load(reinterpret_cast<const float*>(at + 64));
  }
};
template <>
struct ColumnPair<uint16_t> {
  static constexpr int64_t kBytes = 64;
  static MILLRACE_INLINE void Read(const char* at, V16* first, V16* second, bool) {
    U16x32 both;
    std::memcpy(&both, at, sizeof(both));
    *first = Bits<V16>(both << 16);
    *second = Bits<V16>(both & 0xffff0000U);
  }
};

MILLRACE_INLINE void StoreOutput(const GemmArgs& args, int32_t strip, int32_t token, const V16& value) {
  float* const y = args.y[token] + args.y_offset + int64_t{strip - args.strip_begin} * kStripRows;
  const int32_t rows = args.w->rows - strip * kStripRows;
  if (rows >= kStripRows) {
    Store(y, args.scale == nullptr ? value : Load(y) + value * args.scale[token]);
    return;
  }
  float lanes[kStripRows];
  Store(lanes, value);
  for (int32_t r = 0; r < rows; ++r)
    y[r] = args.scale == nullptr ? lanes[r] : y[r] + lanes[r] * args.scale[token];
}

template <typename W, int kStrips, int kTokens>
MILLRACE_INLINE void GemmTile(const GemmArgs& args, int32_t strip, int32_t token) {
  const PackedMatrix& w = *args.w;
  const float* x[kTokens];
  for (int t = 0; t < kTokens; ++t) x[t] = static_cast<const float*>(args.x[token + t]);
  const char* at = w.data + strip * w.strip_bytes;
  V16 sums[kStrips][kTokens] = {};
  int32_t k = 0;
  for (; k + 2 <= w.cols; k += 2, at += ColumnPair<W>::kBytes) {
    V16 first[kStrips];
    V16 second[kStrips];
    for (int s = 0; s < kStrips; ++s)
      ColumnPair<W>::Read(at + s * w.strip_bytes, &first[s], &second[s], true);
    for (int t = 0; t < kTokens; ++t) {
      for (int s = 0; s < kStrips; ++s) sums[s][t] += first[s] * x[t][k];
    }
    for (int t = 0; t < kTokens; ++t) {
      for (int s = 0; s < kStrips; ++s) sums[s][t] += second[s] * x[t][k + 1];
    }
  }
  if (k < w.cols) {
    for (int s = 0; s < kStrips; ++s) {
      V16 first;
      V16 second;
      ColumnPair<W>::Read(at + s * w.strip_bytes, &first, &second, false);
      for (int t = 0; t < kTokens; ++t) sums[s][t] += first * x[t][k];
    }
  }
  for (int s = 0; s < kStrips; ++s) {
    for (int t = 0; t < kTokens; ++t) StoreOutput(args, strip + s, token + t, sums[s][t]);
  }
}

// All tokens over kStrips strips.
template <typename W, int kStrips>
void GemmTokens(const GemmArgs& args, int32_t strip) {
  int32_t t = 0;
  for (; t + kTileTokens <= args.tokens; t += kTileTokens) GemmTile<W, kStrips, kTileTokens>(args, strip, t);
  if constexpr (kTileTokens > 4) {
    for (; t + 4 <= args.tokens; t += 4) GemmTile<W, kStrips, 4>(args, strip, t);
  }
  for (; t + 2 <= args.tokens; t += 2) GemmTile<W, kStrips, 2>(args, strip, t);
  for (; t < args.tokens; ++t) GemmTile<W, kStrips, 1>(args, strip, t);
}

// Few tokens: more strips at once keep enough sums in flight, and read memory as several streams.
template <typename W>
void Gemm(const GemmArgs& args) {
  int32_t strip = args.strip_begin;
  if (args.tokens == 1) {
    for (; strip + 4 <= args.strip_end; strip += 4) GemmTile<W, 4, 1>(args, strip, 0);
  }
  for (; strip + kTileStrips <= args.strip_end; strip += kTileStrips) GemmTokens<W, kTileStrips>(args, strip);
  if constexpr (kTileStrips > 1) {
    for (; strip < args.strip_end; ++strip) GemmTokens<W, 1>(args, strip);
  }
}

// The product of two floats is exact in double, so that contraction to FMA changes nothing.
inline void RmsNorm(const float* x, const float* weight, int32_t count, float eps, float* out) {
  D16 squares = {};
  int32_t i = 0;
  for (; i + 16 <= count; i += 16) {
    const D16 wide = __builtin_convertvector(Load(x + i), D16);
    squares += wide * wide;
  }
  double lanes[16];
  std::memcpy(lanes, &squares, sizeof(lanes));
  double sum = 0;
  for (const double lane : lanes) sum += lane;
  for (; i < count; ++i) sum += double{x[i]} * x[i];
  const auto scale = static_cast<float>(1.0 / __builtin_sqrt(sum / count + double{eps}));
  for (int32_t k = 0; k < count; ++k) out[k] = x[k] * scale * weight[k];
}

// Nearest integers (ties to even) of values * 127 / largest, group by group.
inline void Quantize(const float* x, int32_t count, int8_t* values, ActivationGroup* groups) {
  using I8x16 = int8_t __attribute__((vector_size(16)));
  for (int32_t first = 0; first < count; first += kGroupCols, values += kGroupCols, ++groups) {
    float padded[kGroupCols];
    const float* group = x + first;
    if (count - first < kGroupCols) {
      for (int32_t k = 0; k < kGroupCols; ++k) padded[k] = first + k < count ? group[k] : 0.0f;
      group = padded;
    }
    V16 largest = {};
    for (int32_t k = 0; k < kGroupCols; k += 16) {
      const V16 v = Load(group + k);
      largest = Max(largest, Max(v, -v));
    }
    const float magnitude = Max(largest);
    const float inverse = magnitude > 0 ? 127.0f / magnitude : 0.0f;
    I16x32 sums = {};
    for (int32_t k = 0; k < kGroupCols; k += 16) {
      const I16x32 q = Bits<I16x32>(Load(group + k) * inverse + kRound) - Bits<int32_t>(kRound);
      sums += q;
      const I8x16 narrow = __builtin_convertvector(q, I8x16);
      std::memcpy(values + k, &narrow, sizeof(narrow));
    }
    int32_t lanes[16];
    std::memcpy(lanes, &sums, sizeof(lanes));
    int32_t sum = 0;
    for (const int32_t lane : lanes) sum += lane;
    groups->scale = magnitude / 127.0f;
    groups->minus_sum = -sum;
  }
}

inline void SwiGlu(const float* gate_up, int32_t count, float* out) {
  for (int32_t i = 0; i < count; i += kStripRows) {
    const V16 gate = Load(gate_up + 2 * static_cast<int64_t>(i));
    const V16 up = Load(gate_up + 2 * static_cast<int64_t>(i) + kStripRows);
    Store(out + i, gate / (Exp(-gate) + 1.0f) * up);
  }
}

inline constexpr KernelTable MakeTable(const char* name, void (*int8)(const GemmArgs&),
                                       void (*int4)(const GemmArgs&)) {
  return {name,
          {Gemm<float>, Gemm<uint16_t>, int8, int4},
          Attend<uint16_t>,
          Attend<float>,
          MergePartials,
          RmsNorm,
          Quantize,
          SwiGlu};
}

}  // namespace millrace::engine::MILLRACE_KERNEL_NAMESPACE
