#include "engine/backend/cpu/packing.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>

#include "base/check.h"
#include "engine/backend/cpu/bfloat16.h"

namespace millrace::engine {
namespace {

constexpr int64_t Round64(int64_t bytes) { return (bytes + 63) / 64 * 64; }

using Group = std::array<float, kGroupCols>;

// round(w / scale) of a group, clamped to [low, high]; returns the squared error.
float RoundGroup(const Group& w, float scale, float low, float high, std::array<float, kGroupCols>* q) {
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it leaves the nearest integer
  const float inverse = 1.0f / scale;
  std::array<float, 4> errors{};
  for (size_t k = 0; k < w.size(); ++k) {
    float x = std::min(std::max(w[k] * inverse, low), high);
    x = (x + kRound) - kRound;
    (*q)[k] = x;
    const float error = w[k] - x * scale;
    errors[k % 4] += error * error;
  }
  return errors[0] + errors[1] + errors[2] + errors[3];
}

// Chooses the scale (a bf16 number) and the integers of one group. int8: the largest value becomes +-127.
// int4: it becomes -8 of a range of [-8, 7] that may be mirrored, and smaller scales, which clip it, are
// tried as well.
uint16_t QuantizeGroup(const Group& w, int bits, std::array<float, kGroupCols>* q) {
  float largest = 0;
  for (const float x : w) {
    if (std::fabs(x) > std::fabs(largest)) largest = x;
  }
  if (largest == 0 || !std::isfinite(largest)) {
    q->fill(0);
    return 0;
  }
  if (bits == 8) {
    const uint16_t scale = ToBf16(std::fabs(largest) / 127.0f);
    if (scale == 0)
      q->fill(0);
    else
      RoundGroup(w, FromBf16(scale), -127, 127, q);
    return scale;
  }
  uint16_t best = 0;
  float best_error = INFINITY;
  std::array<float, kGroupCols> candidate;
  q->fill(0);
  for (const float steps : {-8.0f, -8.7f, -9.4f, 7.0f, 7.6f}) {
    const uint16_t scale = ToBf16(largest / steps);
    if ((scale & 0x7fffU) == 0) continue;
    const float error = RoundGroup(w, FromBf16(scale), -8, 7, &candidate);
    if (error < best_error) {
      best_error = error;
      best = scale;
      *q = candidate;
    }
  }
  return best;
}

void PackGroup(const PackedMatrix& w, std::byte* strip, int32_t group, int32_t row, const Group& values) {
  const bool wide = w.format == WeightFormat::kInt8;
  std::array<float, kGroupCols> q;
  const uint16_t scale = QuantizeGroup(values, wide ? 8 : 4, &q);
  auto* const bytes =
      reinterpret_cast<uint8_t*>(strip) + int64_t{group} * (wide ? 1024 : 512) + int64_t{row} * 4;
  for (int32_t k = 0; k < kGroupCols; ++k) {
    const int32_t quad = k / 4;
    if (wide) {
      bytes[quad * 64 + k % 4] = static_cast<uint8_t>(static_cast<int32_t>(q[static_cast<size_t>(k)]) + 128);
    } else {
      uint8_t& both = bytes[quad % 8 * 64 + k % 4];
      const auto half = static_cast<uint8_t>(static_cast<int32_t>(q[static_cast<size_t>(k)]) + 8);
      both = quad < 8 ? static_cast<uint8_t>((both & 0xf0U) | half)
                      : static_cast<uint8_t>((both & 0x0fU) | (half << 4));
    }
  }
  std::memcpy(strip + w.scale_offset + (int64_t{group} * kStripRows + row) * 2, &scale, sizeof(scale));
}

// One row, or zeros where `values` is null.
void PackRow(const PackedMatrix& w, std::byte* strip, int32_t row, const float* values) {
  if (w.format == WeightFormat::kInt8 || w.format == WeightFormat::kInt4) {
    for (int32_t g = 0; g < w.groups; ++g) {
      Group group{};
      const int32_t first = g * kGroupCols;
      const int32_t count = std::min(kGroupCols, w.cols - first);
      if (values != nullptr) std::copy_n(values + first, count, group.begin());
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
