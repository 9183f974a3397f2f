#pragma once
// Large anonymous memory in 2 MiB pages where the kernel gives them: a quarter more bandwidth than 4 KiB
// pages for expert-shaped reads, and never written back to a file.

#include <cstddef>
#include <span>
#include <utility>

#include "base/status.h"

namespace millrace::engine {

// Owns zeroed memory, 64-byte aligned (page-aligned in fact). Movable.
class HugeMemory {
 public:
  // ResourceExhausted names `what` and the bytes.
  static StatusOr<HugeMemory> Allocate(size_t bytes, const char* what);
  HugeMemory() = default;
  HugeMemory(HugeMemory&& other) noexcept
      : bytes_(std::exchange(other.bytes_, {})), mapping_(std::exchange(other.mapping_, {})) {}
  HugeMemory& operator=(HugeMemory&& other) noexcept {
    std::swap(bytes_, other.bytes_);
    std::swap(mapping_, other.mapping_);
    return *this;
  }
  ~HugeMemory();
  std::span<std::byte> bytes() const { return bytes_; }

 private:
  HugeMemory(std::span<std::byte> bytes, std::span<std::byte> mapping) : bytes_(bytes), mapping_(mapping) {}
  std::span<std::byte> bytes_;
  std::span<std::byte> mapping_;
};

}  // namespace millrace::engine
