// Integer products in plain C++: the definition that the other sets are compared with.
#include <cstring>

#include "engine/backend/cpu/gemm_int.h"

namespace millrace::engine {
namespace {

template <int kBits>
int32_t Weight(const char* group, int32_t quad, int32_t row, int32_t byte) {
  if constexpr (kBits == 8) return static_cast<uint8_t>(group[quad * 64 + row * 4 + byte]);
  const auto both = static_cast<uint8_t>(group[quad % 8 * 64 + row * 4 + byte]);
  return quad < 8 ? both & 15 : both >> 4;
}

float Scale(const char* at) {
  uint16_t narrow;
  std::memcpy(&narrow, at, sizeof(narrow));
  const uint32_t bits = static_cast<uint32_t>(narrow) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

template <int kBits>
void Gemm(const GemmArgs& args) {
  constexpr int64_t kGroupBytes = kBits == 8 ? 1024 : 512;
  constexpr int32_t kOffset = kBits == 8 ? 128 : 8;
  const PackedMatrix& w = *args.w;
  for (int32_t strip = args.strip_begin; strip < args.strip_end; ++strip) {
    const char* const data = w.data + strip * w.strip_bytes;
    const int32_t rows = w.rows - strip * kStripRows < kStripRows ? w.rows - strip * kStripRows : kStripRows;
    for (int32_t t = 0; t < args.tokens; ++t) {
      const auto* const x = static_cast<const int8_t*>(args.x[t]);
      const auto* const groups = reinterpret_cast<const ActivationGroup*>(x + int64_t{w.groups} * kGroupCols);
      float totals[kStripRows] = {};
      for (int32_t g = 0; g < w.groups; ++g) {
        int32_t sums[kStripRows];
        for (int32_t& sum : sums) sum = groups[g].minus_sum * kOffset;
        for (int32_t quad = 0; quad < 16; ++quad) {
          const int8_t* const four = x + g * kGroupCols + quad * 4;
          for (int32_t row = 0; row < kStripRows; ++row) {
            for (int32_t byte = 0; byte < 4; ++byte) {
              sums[row] += Weight<kBits>(data + g * kGroupBytes, quad, row, byte) * four[byte];
            }
          }
        }
        for (int32_t row = 0; row < kStripRows; ++row) {
          totals[row] += static_cast<float>(sums[row]) *
                         (Scale(data + w.scale_offset + 32 * int64_t{g} + 2 * row) * groups[g].scale);
        }
      }
      float* const y = args.y[t] + args.y_offset + int64_t{strip - args.strip_begin} * kStripRows;
      for (int32_t row = 0; row < rows; ++row) {
        y[row] = args.scale == nullptr ? totals[row] : y[row] + totals[row] * args.scale[t];
      }
    }
  }
}

}  // namespace

void GemmInt8Portable(const GemmArgs& args) { Gemm<8>(args); }
void GemmInt4Portable(const GemmArgs& args) { Gemm<4>(args); }

}  // namespace millrace::engine
