// Integer products with AMX tiles, bit for bit those of gemm_int_avx512.cc. A group of a strip is a tile as
// it lies: 16 quads x 16 rows x 4 unsigned bytes. tdpbsud multiplies it by the signed activations of 16
// tokens and leaves 16 x 16 exact sums; the fp32 chain over the groups runs in memory that stays in L1.
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "engine/backend/cpu/gemm_int.h"

namespace millrace::engine {
namespace {

#define MILLRACE_INLINE inline __attribute__((always_inline))

constexpr int kTokens = 16;    // rows of a tile
constexpr int kStrips = 4;     // that share one load of the activations
constexpr int kFewTokens = 6;  // up to here tiles are mostly empty: one pass of the vector kernel

template <int kBits>
struct Format {
  static constexpr int64_t kGroupBytes = kBits == 8 ? 1024 : 512;
  static constexpr int kOffsetShift = kBits == 8 ? 7 : 3;
};

// Every tile has 16 rows of 64 bytes.
struct alignas(64) TileConfig {
  uint8_t palette = 1;
  uint8_t start_row = 0;
  uint8_t reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// tmm0 to tmm3: sums of a strip. tmm4: activations. tmm5: weights.
template <int kStrip>
MILLRACE_INLINE void Multiply(const void* weights, void* sums) {
  _tile_loadd(5, weights, 64);
  if constexpr (kStrip == 0) {
    _tile_zero(0);
    _tile_dpbsud(0, 4, 5);
    _tile_stored(0, sums, 64);
  } else if constexpr (kStrip == 1) {
    _tile_zero(1);
    _tile_dpbsud(1, 4, 5);
    _tile_stored(1, sums, 64);
  } else if constexpr (kStrip == 2) {
    _tile_zero(2);
    _tile_dpbsud(2, 4, 5);
    _tile_stored(2, sums, 64);
  } else {
    _tile_zero(3);
    _tile_dpbsud(3, 4, 5);
    _tile_stored(3, sums, 64);
  }
}

// The 1024 bytes that tiles want, of a group of 512 with two codes in each byte.
MILLRACE_INLINE const void* Unpacked(const char* weights, __m512i* out) {
  const __m512i low_half = _mm512_set1_epi8(15);
  for (int q = 0; q < 8; ++q) {
    const __m512i both = _mm512_load_si512(weights + 64 * q);
    out[q] = _mm512_and_si512(both, low_half);
    out[q + 8] = _mm512_and_si512(_mm512_srli_epi16(both, 4), low_half);
  }
  return out;
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

// Strips [strip, strip + strips) for tokens [token, token + tokens), at most kStrips and kTokens.
template <int kBits>
void Tile(const GemmArgs& args, int32_t strip, int32_t strips, int32_t token, int32_t tokens) {
  const PackedMatrix& w = *args.w;
  const int64_t x_bytes = int64_t{w.groups} * kGroupCols;
  __m512i activations[kTokens] = {};  // rows beyond `tokens` stay zero
  __m512i weights[16];
  __m512i sums[kStrips][kTokens];
  __m512 totals[kStrips][kTokens] = {};
  for (int32_t g = 0; g < w.groups; ++g) {
    for (int32_t t = 0; t < tokens; ++t) {
      activations[t] =
          _mm512_loadu_si512(static_cast<const int8_t*>(args.x[token + t]) + int64_t{g} * kGroupCols);
    }
    _tile_loadd(4, activations, 64);
    const auto group_of = [&](int32_t s) {
      const char* const at = w.data + (strip + s) * w.strip_bytes + g * Format<kBits>::kGroupBytes;
      return kBits == 8 ? static_cast<const void*>(at) : Unpacked(at, weights);
    };
    Multiply<0>(group_of(0), sums[0]);
    if (strips > 1) Multiply<1>(group_of(1), sums[1]);
    if (strips > 2) Multiply<2>(group_of(2), sums[2]);
    if (strips > 3) Multiply<3>(group_of(3), sums[3]);
    for (int32_t t = 0; t < tokens; ++t) {
      const auto* const row = static_cast<const int8_t*>(args.x[token + t]);
      const ActivationGroup group = reinterpret_cast<const ActivationGroup*>(row + x_bytes)[g];
      const __m512i start =
          _mm512_slli_epi32(_mm512_set1_epi32(group.minus_sum), Format<kBits>::kOffsetShift);
      const __m512 x_scale = _mm512_set1_ps(group.scale);
      for (int32_t s = 0; s < strips; ++s) {
        const char* const at = w.data + (strip + s) * w.strip_bytes + w.scale_offset + 32 * int64_t{g};
        const __m256i narrow = _mm256_load_si256(reinterpret_cast<const __m256i*>(at));
        const __m512 scales = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(narrow), 16));
        const __m512 sum = _mm512_cvtepi32_ps(_mm512_add_epi32(sums[s][t], start));
        totals[s][t] = _mm512_fmadd_ps(sum, _mm512_mul_ps(scales, x_scale), totals[s][t]);
      }
    }
  }
  for (int32_t s = 0; s < strips; ++s) {
    for (int32_t t = 0; t < tokens; ++t) StoreOutput(args, strip + s, token + t, totals[s][t]);
  }
}

template <int kBits>
void Gemm(const GemmArgs& args) {
  const TileConfig config;
  _tile_loadconfig(&config);
  for (int32_t strip = args.strip_begin; strip < args.strip_end; strip += kStrips) {
    const int32_t strips = args.strip_end - strip < kStrips ? args.strip_end - strip : kStrips;
    for (int32_t token = 0; token < args.tokens; token += kTokens) {
      const int32_t tokens = args.tokens - token < kTokens ? args.tokens - token : kTokens;
      Tile<kBits>(args, strip, strips, token, tokens);
    }
  }
  _tile_release();
}

}  // namespace

bool AskForAmx() {
  constexpr long kRequestPermission = 0x1023;  // ARCH_REQ_XCOMP_PERM
  constexpr long kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

const KernelTable& AmxKernels() {
  static const KernelTable table = [] {
    KernelTable amx = Avx512Kernels();
    amx.name = "amx";
    amx.gemm[static_cast<int32_t>(WeightFormat::kInt8)] = [](const GemmArgs& args) {
      args.tokens <= kFewTokens ? GemmInt8Avx512(args) : Gemm<8>(args);
    };
    amx.gemm[static_cast<int32_t>(WeightFormat::kInt4)] = [](const GemmArgs& args) {
      args.tokens <= kFewTokens ? GemmInt4Avx512(args) : Gemm<4>(args);
    };
    return amx;
  }();
  return table;
}

}  // namespace millrace::engine
