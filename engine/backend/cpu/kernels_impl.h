#pragma once
// Everything but the integer products and attention, one source for every instruction set. The including file
// picks the namespace, the tile sizes and the flags.

#include "engine/backend/cpu/attention_impl.h"
#include "engine/backend/cpu/kernels.h"
#include "engine/backend/cpu/prefetch.h"
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

constexpr int32_t kStretch = 8;  // columns between two steps of the prefetch

template <typename W, int kStrips, int kTokens>
MILLRACE_INLINE void GemmTile(const GemmArgs& args, int32_t strip, int32_t token, Prefetch& ahead) {
  const PackedMatrix& w = *args.w;
  const float* x[kTokens];
  for (int t = 0; t < kTokens; ++t) x[t] = static_cast<const float*>(args.x[token + t]);
  const char* at = w.data + strip * w.strip_bytes;
  V16 sums[kStrips][kTokens] = {};
  for (int32_t k = 0; k < w.cols;) {
    ahead.Advance();
    const int32_t stop = k + kStretch < w.cols ? k + kStretch : w.cols;
    for (; k + 2 <= stop; k += 2, at += ColumnPair<W>::kBytes) {
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
    if (k == stop) continue;
    for (int s = 0; s < kStrips; ++s) {  // the last column of an odd number
      V16 first;
      V16 second;
      ColumnPair<W>::Read(at + s * w.strip_bytes, &first, &second, false);
      for (int t = 0; t < kTokens; ++t) sums[s][t] += first * x[t][k];
    }
    ++k;
  }
  for (int s = 0; s < kStrips; ++s) {
    for (int t = 0; t < kTokens; ++t) StoreOutput(args, strip + s, token + t, sums[s][t]);
  }
}

// The tile of `count` tokens, 1 <= count <= kTokens.
template <typename W, int kStrips, int kTokens>
MILLRACE_INLINE void GemmTileOf(int32_t count, const GemmArgs& args, int32_t strip, int32_t token,
                                Prefetch& ahead) {
  if constexpr (kTokens > 1) {
    if (count < kTokens) return GemmTileOf<W, kStrips, kTokens - 1>(count, args, strip, token, ahead);
  }
  GemmTile<W, kStrips, kTokens>(args, strip, token, ahead);
}

// All tokens over kStrips strips, in tiles of kTokens at most, as equal as can be.
template <typename W, int kStrips, int kTokens>
void GemmTokens(const GemmArgs& args, int32_t strip) {
  const PackedMatrix& w = *args.w;
  int32_t tiles = (args.tokens + kTokens - 1) / kTokens;
  const int32_t following = strip + kStrips;
  const char* const next = following < args.strip_end ? w.data + following * w.strip_bytes : args.next;
  Prefetch ahead =
      Prefetch::Over(next, kStrips * w.strip_bytes, int64_t{tiles} * ((w.cols + kStretch - 1) / kStretch));
  for (int32_t t = 0; tiles > 0; --tiles) {
    const int32_t count = (args.tokens - t + tiles - 1) / tiles;
    GemmTileOf<W, kStrips, kTokens>(count, args, strip, t, ahead);
    t += count;
  }
}

// One token: more strips at once keep enough sums in flight.
template <typename W>
void Gemm(const GemmArgs& args) {
  int32_t strip = args.strip_begin;
  if (args.tokens == 1) {
    for (; strip + 4 <= args.strip_end; strip += 4) GemmTokens<W, 4, 1>(args, strip);
  }
  for (; strip + kTileStrips <= args.strip_end; strip += kTileStrips) {
    GemmTokens<W, kTileStrips, kTileTokens>(args, strip);
  }
  if constexpr (kTileStrips > 1) {
    for (; strip < args.strip_end; ++strip) GemmTokens<W, 1, kTileTokens>(args, strip);
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

inline void AddScaled(const float* x, float scale, int32_t count, float* y) {
  int32_t i = 0;
  for (; i + kStripRows <= count; i += kStripRows) Store(y + i, Load(y + i) + Load(x + i) * scale);
  for (; i < count; ++i) y[i] = y[i] + x[i] * scale;
}

using Pack = void(const float* const* rows, char* codes, uint16_t* scales);
inline constexpr KernelTable MakeTable(const char* name, void (*int8)(const GemmArgs&),
                                       void (*int4)(const GemmArgs&), Pack* pack_int8, Pack* pack_int4) {
  return {name,
          {Gemm<float>, Gemm<uint16_t>, int8, int4},
          Attend<uint16_t>,
          Attend<float>,
          MergePartials,
          RmsNorm,
          Quantize,
          SwiGlu,
          AddScaled,
          pack_int8,
          pack_int4};
}

}  // namespace millrace::engine::MILLRACE_KERNEL_NAMESPACE
