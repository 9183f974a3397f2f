#pragma once
// From rows of fp32 to the strips that the kernels read. The layout is in kernels.h.

#include <cstddef>
#include <span>
#include <string>

#include "base/status.h"
#include "engine/backend/cpu/kernels.h"

namespace millrace::engine {

// A matrix of that shape with its derived sizes and no data.
PackedMatrix MakePackedMatrix(WeightFormat format, int32_t rows, int32_t cols);
inline size_t PackedBytes(const PackedMatrix& w) {
  return static_cast<size_t>(w.strips) * static_cast<size_t>(w.strip_bytes);
}

// Packs `count` rows, values [count][cols], from row `first_row` on. first_row is a multiple of 16; unless
// the matrix ends there, so is count. `strip_step` strips lie between one strip of these rows and the next
// and `strip_first` before the first one: gate and up alternate in one matrix. The result is the same with
// every table of kernels.
void PackRows(const KernelTable& kernels, const PackedMatrix& w, std::byte* data, int64_t first_row,
              std::span<const float> values, int32_t strip_step = 1, int32_t strip_first = 0);

// Bytes of a row of activations for products with `w`: floats, or int8 values and their groups.
size_t ActivationBytes(WeightFormat format, int32_t cols);

}  // namespace millrace::engine
