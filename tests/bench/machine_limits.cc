#include "tests/bench/machine_limits.h"

#include <immintrin.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <functional>
#include <thread>
#include <vector>

#include "base/check.h"
#include "base/cpu.h"
#include "engine/backend/cpu/memory.h"

namespace millrace::bench {
namespace {

constexpr size_t kBytesPerThread = size_t{256} << 20;
constexpr int kStreams = 4;
constexpr int kRuns = 5;

// Seconds that `threads` threads, this one among them, need for work(thread) from a common start: the best of
// kRuns.
double BestSeconds(int threads, const std::function<void(int)>& work) {
  double best = 1e9;
  for (int run = 0; run < kRuns; ++run) {
    std::atomic<int> ready{1};
    const auto start = [&] {
      ++ready;
      while (ready <= threads) _mm_pause();
    };
    std::vector<std::jthread> helpers;
    for (int t = 1; t < threads; ++t) {
      helpers.emplace_back([&, t] {
        start();
        work(t);
      });
    }
    start();
    const auto begin = std::chrono::steady_clock::now();
    work(0);
    helpers.clear();  // joins
    best = std::min(best, std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count());
  }
  return best;
}

__attribute__((target("avx2"))) void ReadAll(const char* data, size_t bytes) {
  const size_t stream = bytes / kStreams;
  __m256i sum = _mm256_setzero_si256();
  for (size_t at = 0; at < stream; at += 64) {
    for (int s = 0; s < kStreams; ++s) {
      const char* const p = data + static_cast<size_t>(s) * stream + at;
      _mm_prefetch(p + 4096, _MM_HINT_T0);
      sum = _mm256_xor_si256(sum, _mm256_load_si256(reinterpret_cast<const __m256i*>(p)));
      sum = _mm256_xor_si256(sum, _mm256_load_si256(reinterpret_cast<const __m256i*>(p + 32)));
    }
  }
  __asm__ volatile("" : : "x"(sum));
}

// Twelve independent sums, in registers, hide the latency.
#define MILLRACE_TWELVE(step) \
  step(0) step(1) step(2) step(3) step(4) step(5) step(6) step(7) step(8) step(9) step(10) step(11)

#define MILLRACE_PEAK_LOOP(name, isa, zero, next)          \
  __attribute__((target(isa))) void name(int64_t rounds) { \
    MILLRACE_TWELVE(zero)                                  \
    for (int64_t r = 0; r < rounds; ++r) {                 \
      MILLRACE_TWELVE(next)                                \
    }                                                      \
  }

#define MILLRACE_ZERO(i) __m512i s##i = _mm512_setzero_si512();
#define MILLRACE_NEXT(i) __asm__ volatile("vpdpbusd %0, %0, %0" : "+v"(s##i));
MILLRACE_PEAK_LOOP(Int8Loop, "avx512f,avx512vnni", MILLRACE_ZERO, MILLRACE_NEXT)
#undef MILLRACE_NEXT
#define MILLRACE_NEXT(i) __asm__ volatile("vfmadd231ps %0, %0, %0" : "+v"(s##i));
MILLRACE_PEAK_LOOP(Fp32Loop512, "avx512f", MILLRACE_ZERO, MILLRACE_NEXT)
#undef MILLRACE_ZERO
#define MILLRACE_ZERO(i) __m256i s##i = _mm256_setzero_si256();
MILLRACE_PEAK_LOOP(Fp32Loop256, "avx2,fma", MILLRACE_ZERO, MILLRACE_NEXT)

}  // namespace

MachineLimits MeasureLimits(int threads) {
  MachineLimits limits;
  const CpuFeatures& cpu = GetCpuFeatures();
  if (!cpu.avx2_fma) return limits;
  auto memory =
      engine::HugeMemory::Allocate(kBytesPerThread * static_cast<size_t>(threads), "bandwidth test");
  MR_CHECK(memory.ok(), "{}", Message(memory.status()));
  const char* const data = reinterpret_cast<const char*>(memory->bytes().data());
  std::fill(memory->bytes().begin(), memory->bytes().end(), std::byte{1});
  const double read = BestSeconds(
      threads, [&](int t) { ReadAll(data + static_cast<size_t>(t) * kBytesPerThread, kBytesPerThread); });
  limits.read_gb_per_s = static_cast<double>(kBytesPerThread) * threads / read / 1e9;
  constexpr int64_t kRounds = 1'000'000;
  const auto rate = [&](double per_round, void (*loop)(int64_t)) {
    return per_round * kRounds * threads / BestSeconds(threads, [&](int) { loop(kRounds); }) / 1e9;
  };
  if (cpu.avx512_vnni) limits.int8_gop_per_s = rate(12 * 128, Int8Loop);
  limits.fp32_gflop_per_s = cpu.avx512 ? rate(12 * 32, Fp32Loop512) : rate(12 * 16, Fp32Loop256);
  return limits;
}

}  // namespace millrace::bench
