#define MILLRACE_KERNEL_NAMESPACE packing_vectors
#include "engine/backend/cpu/packing.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>

#include "base/check.h"
#include "engine/backend/cpu/bfloat16.h"
#include "engine/backend/cpu/vector.h"

namespace millrace::engine {
namespace {

using packing_vectors::Bits;
using packing_vectors::I16x32;
using packing_vectors::kRound;
using packing_vectors::Load;
using packing_vectors::Splat;
using packing_vectors::Sum;
using packing_vectors::V16;

constexpr int64_t Round64(int64_t bytes) { return (bytes + 63) / 64 * 64; }

constexpr int kVectors = kGroupCols / 16;

struct Group {
  V16 values[kVectors];
};
struct Codes {
  I16x32 values[kVectors];
};

// The value of largest magnitude, with its sign; NaN if there is one.
float Largest(const Group& w) {
  V16 high = {};
  V16 low = {};
  V16 sum = {};
  for (const V16& x : w.values) {
    high = x > high ? x : high;
    low = x < low ? x : low;
    sum += x;
  }
  if (std::isnan(Sum(sum))) return NAN;
  const float up = packing_vectors::Max(high);
  const float down = packing_vectors::Max(-low);
  return up >= down ? up : -down;
}

// round(w / scale) of a group, clamped to [low, high]; returns the squared error.
float RoundGroup(const Group& w, float scale, float low, float high, Codes* codes) {
  const float inverse = 1.0f / scale;
  V16 errors = {};
  for (int v = 0; v < kVectors; ++v) {
    V16 x = w.values[v] * inverse;
    x = x > low ? x : Splat(low);
    x = x < high ? x : Splat(high);
    const V16 shifted = x + kRound;
    codes->values[v] = Bits<I16x32>(shifted) - Bits<int32_t>(kRound);
    const V16 error = w.values[v] - (shifted - kRound) * scale;
    errors += error * error;
  }
  return Sum(errors);
}

// Chooses the scale (a bf16 number) and the integers of one group. int8: the largest value becomes +-127.
// int4: it becomes -8 of a range of [-8, 7] that may be mirrored, and smaller scales, which clip it, are
// tried as well.
uint16_t QuantizeGroup(const Group& w, bool int8, Codes* codes) {
  const float largest = Largest(w);
  *codes = {};
  if (largest == 0 || !std::isfinite(largest)) return 0;
  if (int8) {
    const uint16_t scale = ToBf16(std::fabs(largest) / 127.0f);
    if (scale != 0) RoundGroup(w, FromBf16(scale), -127, 127, codes);
    return scale;
  }
  uint16_t best = 0;
  float best_error = INFINITY;
  Codes candidate;
  for (const float steps : {-8.0f, -8.7f, -9.4f, 7.0f, 7.6f}) {
    const uint16_t scale = ToBf16(largest / steps);
    if ((scale & 0x7fffU) == 0) continue;
    const float error = RoundGroup(w, FromBf16(scale), -8, 7, &candidate);
    if (error < best_error || best == 0) {  // huge weights have errors beyond all numbers
      best_error = error;
      best = scale;
      *codes = candidate;
    }
  }
  return best;
}

void PackGroup(const PackedMatrix& w, std::byte* strip, int32_t group, int32_t row, const Group& values) {
  using U8x16 = uint8_t __attribute__((vector_size(16)));
  const bool int8 = w.format == WeightFormat::kInt8;
  Codes codes;
  const uint16_t scale = QuantizeGroup(values, int8, &codes);
  for (I16x32& v : codes.values) v += int8 ? 128 : 8;
  int32_t vectors = kVectors;
  if (!int8) {  // quad q + 8 goes into the high half of quad q
    vectors /= 2;
    for (int v = 0; v < vectors; ++v) codes.values[v] |= codes.values[v + vectors] << 4;
  }
  std::byte* const bytes = strip + int64_t{group} * vectors * 256 + int64_t{row} * 4;
  for (int32_t v = 0; v < vectors; ++v) {
    const U8x16 narrow = __builtin_convertvector(codes.values[v], U8x16);
    std::array<uint32_t, 4> quads;
    std::memcpy(quads.data(), &narrow, sizeof(narrow));
    for (int32_t q = 0; q < 4; ++q) std::memcpy(bytes + (v * 4 + q) * 64, &quads[static_cast<size_t>(q)], 4);
  }
  std::memcpy(strip + w.scale_offset + (int64_t{group} * kStripRows + row) * 2, &scale, sizeof(scale));
}

// One row, or zeros where `values` is null.
void PackRow(const PackedMatrix& w, std::byte* strip, int32_t row, const float* values) {
  if (w.format == WeightFormat::kInt8 || w.format == WeightFormat::kInt4) {
    for (int32_t g = 0; g < w.groups; ++g) {
      Group group{};
      const int32_t first = g * kGroupCols;
      const auto count = static_cast<size_t>(std::min(kGroupCols, w.cols - first));
      if (values != nullptr) std::memcpy(group.values, values + first, count * sizeof(float));
      PackGroup(w, strip, g, row, group);
    }
    return;
  }
  for (int64_t k = 0; k < w.cols; ++k) {
    const float value = values != nullptr ? values[k] : 0.0f;
    if (w.format == WeightFormat::kF32) {
      std::memcpy(strip + (k * kStripRows + row) * 4, &value, 4);
    } else {
      const uint16_t narrow = ToBf16(value);
      std::memcpy(strip + ((k / 2 * kStripRows + row) * 2 + k % 2) * 2, &narrow, 2);
    }
  }
}

}  // namespace

PackedMatrix MakePackedMatrix(WeightFormat format, int32_t rows, int32_t cols) {
  PackedMatrix w;
  w.format = format;
  w.rows = rows;
  w.cols = cols;
  w.strips = (rows + kStripRows - 1) / kStripRows;
  w.groups = (cols + kGroupCols - 1) / kGroupCols;
  switch (format) {
    case WeightFormat::kF32:
      w.strip_bytes = int64_t{cols} * 64;
      break;
    case WeightFormat::kBf16:
      w.strip_bytes = (int64_t{cols} + 1) / 2 * 64;
      break;
    case WeightFormat::kInt8:
    case WeightFormat::kInt4:
      w.scale_offset = int64_t{w.groups} * (format == WeightFormat::kInt8 ? 1024 : 512);
      w.strip_bytes = w.scale_offset + Round64(int64_t{w.groups} * 32);
      break;
  }
  return w;
}

void PackRows(const PackedMatrix& w, std::byte* data, int64_t first_row, std::span<const float> values,
              int32_t strip_step, int32_t strip_first) {
  MR_CHECK(first_row % kStripRows == 0 && values.size() % static_cast<size_t>(w.cols) == 0);
  const auto count = static_cast<int64_t>(values.size()) / w.cols;
  const int64_t padded = (count + kStripRows - 1) / kStripRows * kStripRows;
  for (int64_t r = 0; r < padded; ++r) {
    const int64_t row = first_row + r;
    const int64_t strip = row / kStripRows * strip_step + strip_first;
    PackRow(w, data + strip * w.strip_bytes, static_cast<int32_t>(row % kStripRows),
            r < count ? values.data() + r * w.cols : nullptr);
  }
}

size_t ActivationBytes(WeightFormat format, int32_t cols) {
  if (format == WeightFormat::kF32 || format == WeightFormat::kBf16) {
    return static_cast<size_t>(Round64(int64_t{cols} * 4));
  }
  const int64_t groups = (cols + kGroupCols - 1) / kGroupCols;
  return static_cast<size_t>(Round64(groups * static_cast<int64_t>(kGroupCols + sizeof(ActivationGroup))));
}

}  // namespace millrace::engine
