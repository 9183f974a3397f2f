#pragma once
// Memory that transfer-bench moves: anonymous pages, asked for as huge ones, faulted in at once so that no
// measurement pays for them. And what a process has used.

#include <sys/mman.h>
#include <sys/resource.h>

#include <span>
#include <utility>

#include "base/status.h"

namespace millrace::server {

class BenchMemory {
 public:
  BenchMemory() = default;
  BenchMemory(BenchMemory&& other) noexcept : bytes_(std::exchange(other.bytes_, {})) {}
  BenchMemory& operator=(BenchMemory&& other) noexcept {
    std::swap(bytes_, other.bytes_);
    return *this;
  }
  ~BenchMemory() {
    if (!bytes_.empty()) munmap(bytes_.data(), bytes_.size());
  }

  static StatusOr<BenchMemory> Allocate(size_t bytes) {
    if (bytes == 0) return InvalidArgument("memory of 0 bytes");
    void* const memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) return ResourceExhausted("no memory for {} bytes", bytes);
    BenchMemory allocated;
    allocated.bytes_ = {static_cast<std::byte*>(memory), bytes};
    madvise(memory, bytes, MADV_HUGEPAGE);  // a wish: ordinary pages do as well
    madvise(memory, bytes, MADV_POPULATE_WRITE);
    return allocated;
  }
  std::span<std::byte> bytes() const { return bytes_; }

 private:
  std::span<std::byte> bytes_;
};

// User and system time of this process so far, in seconds.
inline double ProcessCpuSeconds() {
  rusage usage{};
  getrusage(RUSAGE_SELF, &usage);
  const auto seconds = [](const timeval& t) {
    return static_cast<double>(t.tv_sec) + static_cast<double>(t.tv_usec) * 1e-6;
  };
  return seconds(usage.ru_utime) + seconds(usage.ru_stime);
}

}  // namespace millrace::server
