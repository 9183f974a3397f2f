#pragma once
// Owners of device and pinned host memory, and the layout of many arrays in one allocation.

#include <cuda_runtime.h>

#include <cstddef>
#include <utility>

#include "engine/backend/cuda/result.h"

namespace millrace::engine::cuda {

// Device memory, not initialised. Movable; freed with its owner.
class DeviceMemory {
 public:
  // An error names `what`, the bytes wanted and the bytes free.
  static Result Allocate(size_t bytes, const char* what, DeviceMemory* memory);
  DeviceMemory() = default;
  DeviceMemory(DeviceMemory&& other) noexcept
      : data_(std::exchange(other.data_, nullptr)), bytes_(std::exchange(other.bytes_, 0)) {}
  DeviceMemory& operator=(DeviceMemory&& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(bytes_, other.bytes_);
    return *this;
  }
  ~DeviceMemory();
  std::byte* data() const { return data_; }
  size_t bytes() const { return bytes_; }

 private:
  std::byte* data_ = nullptr;
  size_t bytes_ = 0;
};

// Zeroed page-locked host memory: the copy engines reach it directly. Movable; freed with its owner.
class PinnedMemory {
 public:
  static Result Allocate(size_t bytes, const char* what, PinnedMemory* memory);
  PinnedMemory() = default;
  PinnedMemory(PinnedMemory&& other) noexcept
      : data_(std::exchange(other.data_, nullptr)), bytes_(std::exchange(other.bytes_, 0)) {}
  PinnedMemory& operator=(PinnedMemory&& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(bytes_, other.bytes_);
    return *this;
  }
  ~PinnedMemory();
  std::byte* data() const { return data_; }
  size_t bytes() const { return bytes_; }

 private:
  std::byte* data_ = nullptr;
  size_t bytes_ = 0;
};

// Places arrays one after another at 256-byte boundaries. Run without a base first, to learn the size.
class Layout {
 public:
  explicit Layout(std::byte* base) : base_(base) {}
  template <typename T>
  T* Place(size_t count) {
    const size_t offset = bytes_;
    bytes_ += (count * sizeof(T) + 255) / 256 * 256;
    return base_ == nullptr ? nullptr : reinterpret_cast<T*>(base_ + offset);
  }
  size_t bytes() const { return bytes_; }

 private:
  std::byte* const base_;
  size_t bytes_ = 0;
};

}  // namespace millrace::engine::cuda
