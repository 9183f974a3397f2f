#pragma once
// Brings the weights that a thread reads next into its L2 cache, spread evenly over the work on those it has,
// so that memory never waits for the sums nor the sums for memory. For the kernel files only.

#include <cstdint>

namespace millrace::engine {

struct Prefetch {
  const char* at;  // 64-byte aligned
  const char* end;
  int64_t step;  // bytes per Advance, a multiple of 64

  // [begin, begin + bytes) over `calls` calls of Advance; begin may be null: nothing.
  static inline __attribute__((always_inline)) Prefetch Over(const char* begin, int64_t bytes,
                                                             int64_t calls) {
    if (begin == nullptr) return {nullptr, nullptr, 0};
    return {begin, begin + bytes, ((bytes + calls - 1) / calls + 63) / 64 * 64};
  }
  inline __attribute__((always_inline)) void Advance() {
    const char* const stop = end - at < step ? end : at + step;
    for (; at < stop; at += 64) __builtin_prefetch(at, 0, 2);
  }
};

}  // namespace millrace::engine
