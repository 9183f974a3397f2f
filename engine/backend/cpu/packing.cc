#include "engine/backend/cpu/packing.h"

#include <algorithm>
#include <array>
#include <cstring>

#include "base/check.h"
#include "engine/backend/cpu/bfloat16.h"

namespace millrace::engine {
namespace {

constexpr int64_t Round64(int64_t bytes) { return (bytes + 63) / 64 * 64; }

// Rows of one strip, zeros where a pointer is null.
using StripRows = std::array<const float*, kStripRows>;

void PackIntegers(const KernelTable& kernels, const PackedMatrix& w, std::byte* strip,
                  const StripRows& rows) {
  const bool int8 = w.format == WeightFormat::kInt8;
  std::array<std::array<float, kGroupCols>, kStripRows> padded{};
  for (int32_t g = 0; g < w.groups; ++g) {
    const int32_t first = g * kGroupCols;
    const auto count = static_cast<size_t>(std::min(kGroupCols, w.cols - first));
    StripRows group;
    for (size_t r = 0; r < rows.size(); ++r) {
      if (rows[r] != nullptr && count == kGroupCols) {
        group[r] = rows[r] + first;
        continue;
      }
      padded[r].fill(0);
      if (rows[r] != nullptr) std::copy_n(rows[r] + first, count, padded[r].begin());
      group[r] = padded[r].data();
    }
    auto* const codes = reinterpret_cast<char*>(strip) + int64_t{g} * (int8 ? 1024 : 512);
    auto* const scales = reinterpret_cast<uint16_t*>(strip + w.scale_offset) + g * kStripRows;
    (int8 ? kernels.pack_int8 : kernels.pack_int4)(group.data(), codes, scales);
  }
}

void PackFloats(const PackedMatrix& w, std::byte* strip, const StripRows& rows) {
  for (int32_t r = 0; r < kStripRows; ++r) {
    const float* const values = rows[static_cast<size_t>(r)];
    for (int64_t k = 0; k < w.cols; ++k) {
      const float value = values != nullptr ? values[k] : 0.0f;
      if (w.format == WeightFormat::kF32) {
        std::memcpy(strip + (k * kStripRows + r) * 4, &value, 4);
      } else {
        const uint16_t narrow = ToBf16(value);
        std::memcpy(strip + ((k / 2 * kStripRows + r) * 2 + k % 2) * 2, &narrow, 2);
      }
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

void PackRows(const KernelTable& kernels, const PackedMatrix& w, std::byte* data, int64_t first_row,
              std::span<const float> values, int32_t strip_step, int32_t strip_first) {
  MR_CHECK(first_row % kStripRows == 0 && values.size() % static_cast<size_t>(w.cols) == 0);
  const auto count = static_cast<int64_t>(values.size()) / w.cols;
  for (int64_t row = 0; row < count; row += kStripRows) {
    StripRows rows{};
    for (int64_t r = 0; r < std::min<int64_t>(kStripRows, count - row); ++r) {
      rows[static_cast<size_t>(r)] = values.data() + (row + r) * w.cols;
    }
    const int64_t strip = (first_row + row) / kStripRows * strip_step + strip_first;
    std::byte* const place = data + strip * w.strip_bytes;
    if (w.format == WeightFormat::kInt8 || w.format == WeightFormat::kInt4) {
      PackIntegers(kernels, w, place, rows);
    } else {
      PackFloats(w, place, rows);
    }
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
