// Integer products with AVX2. int4: vpmaddubsw cannot saturate (2 * 15 * 127 fits 16 bits even eight times
// over). int8: it could, so bytes are widened to 16 bits and go through vpmaddwd. The sums are those of the
// other sets.
#include <immintrin.h>

#include "engine/backend/cpu/gemm_int.h"

namespace millrace::engine {
namespace {

#define MILLRACE_INLINE inline __attribute__((always_inline))

template <int kBits>
struct Format {
  static constexpr int64_t kGroupBytes = kBits == 8 ? 1024 : 512;
  static constexpr int kOffset = kBits == 8 ? 128 : 8;
};

MILLRACE_INLINE __m256i Load(const char* at) {
  return _mm256_load_si256(reinterpret_cast<const __m256i*>(at));
}

MILLRACE_INLINE __m256i Quad(const int8_t* x, int index) {
  int32_t four;
  __builtin_memcpy(&four, x + 4 * index, sizeof(four));
  return _mm256_set1_epi32(four);
}

MILLRACE_INLINE __m256 LoadScales(const char* at) {
  const __m128i narrow = _mm_load_si128(reinterpret_cast<const __m128i*>(at));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(narrow), 16));
}

MILLRACE_INLINE void StoreOutput(const GemmArgs& args, int32_t strip, int32_t token,
                                 const __m256 (&value)[2]) {
  float* const y = args.y[token] + args.y_offset + int64_t{strip - args.strip_begin} * kStripRows;
  const int32_t rows = args.w->rows - strip * kStripRows;
  if (rows < kStripRows) {
    float lanes[kStripRows];
    _mm256_storeu_ps(lanes, value[0]);
    _mm256_storeu_ps(lanes + 8, value[1]);
    for (int32_t r = 0; r < rows; ++r) {
      y[r] = args.scale == nullptr ? lanes[r] : __builtin_fmaf(lanes[r], args.scale[token], y[r]);
    }
    return;
  }
  for (int half = 0; half < 2; ++half) {
    __m256 result = value[half];
    if (args.scale != nullptr) {
      result = _mm256_fmadd_ps(result, _mm256_set1_ps(args.scale[token]), _mm256_loadu_ps(y + 8 * half));
    }
    _mm256_storeu_ps(y + 8 * half, result);
  }
}

// sums[t][half]: rows 0-7 and 8-15.
template <int kTokens>
MILLRACE_INLINE void GroupInt8(const char* weights, const int8_t* const* x, int64_t x_offset,
                               __m256i (&sums)[kTokens][2]) {
  const __m256i even = _mm256_set1_epi16(0x00ff);
  for (int q = 0; q < 16; ++q) {
    for (int half = 0; half < 2; ++half) {
      const __m256i w = Load(weights + 64 * q + 32 * half);
      const __m256i w_even = _mm256_and_si256(w, even);
      const __m256i w_odd = _mm256_srli_epi16(w, 8);
      for (int t = 0; t < kTokens; ++t) {
        const __m256i four = Quad(x[t] + x_offset, q);
        const __m256i x_even = _mm256_srai_epi16(_mm256_slli_epi16(four, 8), 8);
        const __m256i x_odd = _mm256_srai_epi16(four, 8);
        sums[t][half] = _mm256_add_epi32(sums[t][half], _mm256_add_epi32(_mm256_madd_epi16(w_even, x_even),
                                                                         _mm256_madd_epi16(w_odd, x_odd)));
      }
    }
  }
}

template <int kTokens>
MILLRACE_INLINE void GroupInt4(const char* weights, const int8_t* const* x, int64_t x_offset,
                               __m256i (&sums)[kTokens][2]) {
  const __m256i low_half = _mm256_set1_epi8(15);
  const __m256i ones = _mm256_set1_epi16(1);
  for (int high = 0; high < 2; ++high) {
    __m256i pairs[kTokens][2];
    for (int t = 0; t < kTokens; ++t) pairs[t][0] = pairs[t][1] = _mm256_setzero_si256();
    for (int q = 0; q < 8; ++q) {
      for (int half = 0; half < 2; ++half) {
        const __m256i both = Load(weights + 64 * q + 32 * half);
        const __m256i w = _mm256_and_si256(high != 0 ? _mm256_srli_epi16(both, 4) : both, low_half);
        for (int t = 0; t < kTokens; ++t) {
          const __m256i four = Quad(x[t] + x_offset, q + 8 * high);
          pairs[t][half] = _mm256_add_epi16(pairs[t][half], _mm256_maddubs_epi16(w, four));
        }
      }
    }
    for (int t = 0; t < kTokens; ++t) {
      for (int half = 0; half < 2; ++half) {
        sums[t][half] = _mm256_add_epi32(sums[t][half], _mm256_madd_epi16(pairs[t][half], ones));
      }
    }
  }
}

template <int kBits, int kTokens>
MILLRACE_INLINE void Tile(const GemmArgs& args, int32_t strip, int32_t token) {
  const PackedMatrix& w = *args.w;
  const int64_t x_bytes = int64_t{w.groups} * kGroupCols;
  const char* const data = w.data + strip * w.strip_bytes;
  const int8_t* x[kTokens];
  for (int t = 0; t < kTokens; ++t) x[t] = static_cast<const int8_t*>(args.x[token + t]);
  __m256 totals[kTokens][2];
  for (int t = 0; t < kTokens; ++t) totals[t][0] = totals[t][1] = _mm256_setzero_ps();
  for (int32_t g = 0; g < w.groups; ++g) {
    const auto group_of = [&](int t) { return reinterpret_cast<const ActivationGroup*>(x[t] + x_bytes) + g; };
    __m256i sums[kTokens][2];
    for (int t = 0; t < kTokens; ++t) {
      sums[t][0] = sums[t][1] = _mm256_set1_epi32(group_of(t)->minus_sum * Format<kBits>::kOffset);
    }
    const char* const weights = data + g * Format<kBits>::kGroupBytes;
    if constexpr (kBits == 8) {
      GroupInt8<kTokens>(weights, x, int64_t{g} * kGroupCols, sums);
    } else {
      GroupInt4<kTokens>(weights, x, int64_t{g} * kGroupCols, sums);
    }
    for (int half = 0; half < 2; ++half) {
      const __m256 scales = LoadScales(data + w.scale_offset + 32 * int64_t{g} + 16 * half);
      for (int t = 0; t < kTokens; ++t) {
        const __m256 scale = _mm256_mul_ps(scales, _mm256_set1_ps(group_of(t)->scale));
        totals[t][half] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sums[t][half]), scale, totals[t][half]);
      }
    }
  }
  for (int t = 0; t < kTokens; ++t) StoreOutput(args, strip, token + t, totals[t]);
}

template <int kBits>
void Gemm(const GemmArgs& args) {
  for (int32_t strip = args.strip_begin; strip < args.strip_end; ++strip) {
    int32_t t = 0;
    for (; t + 4 <= args.tokens; t += 4) Tile<kBits, 4>(args, strip, t);
    for (; t + 2 <= args.tokens; t += 2) Tile<kBits, 2>(args, strip, t);
    if (t < args.tokens) Tile<kBits, 1>(args, strip, t);
  }
}

}  // namespace

void GemmInt8Avx2(const GemmArgs& args) { Gemm<8>(args); }
void GemmInt4Avx2(const GemmArgs& args) { Gemm<4>(args); }

}  // namespace millrace::engine
