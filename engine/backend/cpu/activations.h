#pragma once
// Rows of activations: fixed memory, a pointer per row.

#include <cstddef>
#include <cstdint>
#include <memory>
#include <new>
#include <span>
#include <vector>

namespace millrace::engine {

// Owns bytes aligned to a cache line, uninitialised.
class AlignedBytes {
 public:
  explicit AlignedBytes(size_t bytes)
      : bytes_(bytes), data_(static_cast<std::byte*>(::operator new (bytes, std::align_val_t{64}))) {}
  std::byte* data() const { return data_.get(); }
  size_t size() const { return bytes_; }

 private:
  struct Free {
    void operator()(std::byte* data) const { ::operator delete (data, std::align_val_t{64}); }
  };
  size_t bytes_;
  std::unique_ptr<std::byte, Free> data_;
};

// [rows] of `row_bytes` each, a multiple of 64.
class Rows {
 public:
  Rows(size_t rows, size_t row_bytes) : memory_(rows * row_bytes) {
    for (size_t r = 0; r < rows; ++r) {
      std::byte* const row = memory_.data() + r * row_bytes;
      floats_.push_back(reinterpret_cast<float*>(row));
      inputs_.push_back(row);
    }
  }
  float* operator[](size_t row) const { return floats_[row]; }
  std::span<float* const> first(size_t rows) const { return {floats_.data(), rows}; }
  std::span<const void* const> input(size_t rows) const { return {inputs_.data(), rows}; }

 private:
  AlignedBytes memory_;
  std::vector<float*> floats_;
  std::vector<const void*> inputs_;
};

// [rows, width] fp32, rows padded to whole cache lines.
inline Rows FloatRows(int32_t rows, int32_t width) {
  return Rows(static_cast<size_t>(rows), (static_cast<size_t>(width) * sizeof(float) + 63) / 64 * 64);
}

}  // namespace millrace::engine
