// Integer products with VNNI: vpdpbusd multiplies 4 unsigned weight bytes by 4 signed activation bytes per
// lane, a lane per output row. The weights' offset (128 or 8) is taken out by starting each group's sums at
// minus the offset times the sum of the activations. Sums inside a group are exact; one fp32 chain runs over
// the groups.
#include <immintrin.h>

#include "engine/backend/cpu/gemm_int.h"
#include "engine/backend/cpu/prefetch.h"

namespace millrace::engine {
namespace {

#define MILLRACE_INLINE inline __attribute__((always_inline))

constexpr int kTileTokens = 6;  // with two strips, 12 chains of vpdpbusd: they hide its latency of 5

template <int kBits>
struct Format {
  static constexpr int64_t kGroupBytes = kBits == 8 ? 1024 : 512;
  static constexpr int kOffsetShift = kBits == 8 ? 7 : 3;
  static constexpr int kPrefetches = kBits == 8 ? 2 : 1;  // calls of Advance per group
};

MILLRACE_INLINE __m512 LoadScales(const char* at) {
  const __m256i narrow = _mm256_load_si256(reinterpret_cast<const __m256i*>(at));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(narrow), 16));
}

MILLRACE_INLINE void StoreOutput(const GemmArgs& args, int32_t strip, int32_t token, __m512 value) {
  float* const y = args.y[token] + args.y_offset + int64_t{strip - args.strip_begin} * kStripRows;
  const int32_t rows = args.w->rows - strip * kStripRows;
  const auto mask = static_cast<__mmask16>(rows >= kStripRows ? 0xffff : (1U << rows) - 1);
  if (args.scale != nullptr) {
    value = _mm512_fmadd_ps(value, _mm512_set1_ps(args.scale[token]), _mm512_maskz_loadu_ps(mask, y));
  }
  _mm512_mask_storeu_ps(y, mask, value);
}

// Weights that a single tile reads, once: straight into L1, a page of latency ahead on each strip. (Through
// L2, as Prefetch does for strips that several tiles read, every line would take a fill buffer twice.)
template <int kBits, int kStrips>
struct ReadOnce {
  static constexpr int64_t kAhead = 4096;
  static constexpr int64_t kBytes = Format<kBits>::kGroupBytes / Format<kBits>::kPrefetches;
  const char* data;
  const char* next;
  int64_t strip_bytes;
  int64_t scale_offset;
  int64_t at = 0;

  MILLRACE_INLINE void Advance() {
    // The scales come last in a strip, so this runs into them, and then into the strip after next.
    const int64_t target = at + kAhead;
    const char* from = target < scale_offset ? data + target : next + (target - scale_offset);
    const char* scales = next + scale_offset + 32 * at / Format<kBits>::kGroupBytes;
    for (int s = 0; s < kStrips; ++s, from += strip_bytes, scales += strip_bytes) {
#pragma GCC unroll 16
      for (int64_t line = 0; line < kBytes; line += 64) _mm_prefetch(from + line, _MM_HINT_T0);
      _mm_prefetch(scales, _MM_HINT_T0);
    }
    at += kBytes;
  }
};

// The weights of one group of kStrips strips for kTokens tokens. x[t] points at the group's activations.
template <int kBits, int kStrips, int kTokens, typename Ahead>
MILLRACE_INLINE void GroupProduct(const char* weights, int64_t strip_bytes, const int8_t* const* x,
                                  int64_t x_offset, __m512i (&sums)[kStrips][kTokens], Ahead& ahead) {
  const auto quad = [&](int t, int index) {
    int32_t four;
    __builtin_memcpy(&four, x[t] + x_offset + 4 * index, sizeof(four));
    return _mm512_set1_epi32(four);
  };
  if constexpr (kBits == 8) {
#pragma GCC unroll 16
    for (int q = 0; q < 16; ++q) {
      if (q % 8 == 0) ahead.Advance();
      __m512i w[kStrips];
      for (int s = 0; s < kStrips; ++s) w[s] = _mm512_load_si512(weights + s * strip_bytes + 64 * q);
#pragma GCC unroll 16
      for (int t = 0; t < kTokens; ++t) {
        const __m512i four = quad(t, q);
        for (int s = 0; s < kStrips; ++s) sums[s][t] = _mm512_dpbusd_epi32(sums[s][t], w[s], four);
      }
    }
  } else {
    ahead.Advance();
    const __m512i low_half = _mm512_set1_epi8(15);
#pragma GCC unroll 8
    for (int q = 0; q < 8; ++q) {
      __m512i low[kStrips];
      __m512i high[kStrips];
      for (int s = 0; s < kStrips; ++s) {
        const __m512i both = _mm512_load_si512(weights + s * strip_bytes + 64 * q);
        low[s] = _mm512_and_si512(both, low_half);
        high[s] = _mm512_and_si512(_mm512_srli_epi16(both, 4), low_half);
      }
#pragma GCC unroll 16
      for (int t = 0; t < kTokens; ++t) {
        const __m512i four = quad(t, q);
        for (int s = 0; s < kStrips; ++s) sums[s][t] = _mm512_dpbusd_epi32(sums[s][t], low[s], four);
      }
#pragma GCC unroll 16
      for (int t = 0; t < kTokens; ++t) {
        const __m512i four = quad(t, q + 8);
        for (int s = 0; s < kStrips; ++s) sums[s][t] = _mm512_dpbusd_epi32(sums[s][t], high[s], four);
      }
    }
  }
}

template <int kBits, int kStrips, int kTokens, typename Ahead>
MILLRACE_INLINE void Tile(const GemmArgs& args, int32_t strip, int32_t token, Ahead& ahead) {
  const PackedMatrix& w = *args.w;
  const int64_t x_bytes = int64_t{w.groups} * kGroupCols;
  const char* const data = w.data + strip * w.strip_bytes;
  const int8_t* x[kTokens];
  for (int t = 0; t < kTokens; ++t) x[t] = static_cast<const int8_t*>(args.x[token + t]);
  __m512 totals[kStrips][kTokens];
  for (int s = 0; s < kStrips; ++s) {
    for (int t = 0; t < kTokens; ++t) totals[s][t] = _mm512_setzero_ps();
  }
  for (int32_t g = 0; g < w.groups; ++g) {
    const int64_t at = g * Format<kBits>::kGroupBytes;
    const auto group_of = [&](int t) { return reinterpret_cast<const ActivationGroup*>(x[t] + x_bytes) + g; };
    __m512i sums[kStrips][kTokens];
    for (int t = 0; t < kTokens; ++t) {
      const __m512i start =
          _mm512_slli_epi32(_mm512_set1_epi32(group_of(t)->minus_sum), Format<kBits>::kOffsetShift);
      for (int s = 0; s < kStrips; ++s) sums[s][t] = start;
    }
    GroupProduct<kBits, kStrips, kTokens>(data + at, w.strip_bytes, x, int64_t{g} * kGroupCols, sums, ahead);
    for (int s = 0; s < kStrips; ++s) {
      const __m512 scales = LoadScales(data + s * w.strip_bytes + w.scale_offset + 32 * int64_t{g});
      for (int t = 0; t < kTokens; ++t) {
        const __m512 scale = _mm512_mul_ps(scales, _mm512_set1_ps(group_of(t)->scale));
        totals[s][t] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sums[s][t]), scale, totals[s][t]);
      }
    }
  }
  for (int s = 0; s < kStrips; ++s) {
    for (int t = 0; t < kTokens; ++t) StoreOutput(args, strip + s, token + t, totals[s][t]);
  }
}

// The tile of `count` tokens, kTokensMin <= count <= kTokens.
template <int kBits, int kStrips, int kTokensMin, int kTokens, typename Ahead>
MILLRACE_INLINE void TileOf(int32_t count, const GemmArgs& args, int32_t strip, int32_t token, Ahead& ahead) {
  if constexpr (kTokens > kTokensMin) {
    if (count < kTokens)
      return TileOf<kBits, kStrips, kTokensMin, kTokens - 1>(count, args, strip, token, ahead);
  }
  Tile<kBits, kStrips, kTokens>(args, strip, token, ahead);
}

// Strips outside, tokens inside: the strips stay in cache while every token passes, in tiles as equal as can
// be. `ahead`: the strips read after these, or null.
template <int kBits, int kStrips>
void AllTokens(const GemmArgs& args, int32_t strip, const char* ahead) {
  const PackedMatrix& w = *args.w;
  if (args.tokens <= kTileTokens) {
    const char* const data = w.data + strip * w.strip_bytes;
    ReadOnce<kBits, kStrips> once{data, ahead != nullptr ? ahead : data, w.strip_bytes, w.scale_offset};
    return TileOf<kBits, kStrips, 1, kTileTokens>(args.tokens, args, strip, 0, once);
  }
  int32_t tiles = (args.tokens + kTileTokens - 1) / kTileTokens;
  Prefetch prefetch =
      Prefetch::Over(ahead, kStrips * w.strip_bytes, int64_t{tiles} * w.groups * Format<kBits>::kPrefetches);
  for (int32_t t = 0; tiles > 0; --tiles) {
    const int32_t count = (args.tokens - t + tiles - 1) / tiles;
    TileOf<kBits, kStrips, kTileTokens / 2, kTileTokens>(count, args, strip, t, prefetch);
    t += count;
  }
}

template <int kBits>
void Gemm(const GemmArgs& args) {
  const int64_t strip_bytes = args.w->strip_bytes;
  int32_t strip = args.strip_begin;
  for (; strip < args.strip_end; strip += 2) {
    const bool pair = strip + 2 <= args.strip_end;
    const char* const ahead =
        strip + 2 < args.strip_end ? args.w->data + (strip + 2) * strip_bytes : args.next;
    pair ? AllTokens<kBits, 2>(args, strip, ahead) : AllTokens<kBits, 1>(args, strip, ahead);
  }
}

}  // namespace

void GemmInt8Avx512(const GemmArgs& args) { Gemm<8>(args); }
void GemmInt4Avx512(const GemmArgs& args) { Gemm<4>(args); }

}  // namespace millrace::engine
