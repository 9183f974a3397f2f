#include "engine/sampling/logit_kernels.h"

#include <algorithm>
#include <bit>
#include <cstring>
#include <limits>
#include <vector>

#include "base/cpu.h"

namespace millrace::engine {
namespace {

#define MILLRACE_INLINE inline __attribute__((always_inline))

constexpr size_t kFloats = 16;
constexpr size_t kDoubles = 8;
constexpr size_t kBlock = 1024;  // of ArgMax
using Floats = float __attribute__((vector_size(4 * kFloats)));
using HalfFloats = float __attribute__((vector_size(4 * kDoubles)));
using Doubles = double __attribute__((vector_size(8 * kDoubles)));
using Longs = int64_t __attribute__((vector_size(8 * kDoubles)));
using Ints = int32_t __attribute__((vector_size(4 * kDoubles)));
using Bytes = uint8_t __attribute__((vector_size(kDoubles)));

constexpr float kMasked = -std::numeric_limits<float>::infinity();

MILLRACE_INLINE float MaxOf(const float* values, size_t count) {
  Floats best;
  for (size_t lane = 0; lane < kFloats; ++lane) best[lane] = kMasked;
  size_t i = 0;
  for (; i + kFloats <= count; i += kFloats) {
    Floats next;
    std::memcpy(&next, values + i, sizeof(next));
    best = next > best ? next : best;  // not where `next` is no number
  }
  float max = kMasked;
  for (size_t lane = 0; lane < kFloats; ++lane) max = best[lane] > max ? best[lane] : max;
  for (; i < count; ++i) max = values[i] > max ? values[i] : max;
  return max;
}

MILLRACE_INLINE int32_t ArgMaxIn(std::span<const float> logits) {
  float best = kMasked;
  size_t best_block = 0;
  for (size_t begin = 0; begin < logits.size(); begin += kBlock) {
    const float max = MaxOf(logits.data() + begin, std::min(kBlock, logits.size() - begin));
    if (max > best) {  // strict: ties go to the lowest id
      best = max;
      best_block = begin;
    }
  }
  if (best == kMasked) return 0;
  return static_cast<int32_t>(
      std::find(logits.begin() + static_cast<ptrdiff_t>(best_block), logits.end(), best) - logits.begin());
}

// exp by its Taylor series around the nearest multiple of ln 2: |r| <= 0.35, so that what is left out is
// below 1e-17. Every product and sum is rounded by itself.
MILLRACE_INLINE Doubles Exp(Doubles x) {
  constexpr double kLog2E = 0x1.71547652b82fep+0;
  constexpr double kLn2High = 0x1.62e42fefa0000p-1;  // short: times a small integer it is exact
  constexpr double kLn2Low = 0x1.cf79abc9e3b3ap-40;
  constexpr double kRound = 0x1.8p52;  // added, it leaves the nearest integer in the lowest bits
  constexpr double kInverseFactorials[] = {
      1.0 / 6227020800, 1.0 / 479001600, 1.0 / 39916800, 1.0 / 3628800, 1.0 / 362880, 1.0 / 40320, 1.0 / 5040,
      1.0 / 720,        1.0 / 120,       1.0 / 24,       1.0 / 6,       1.0 / 2,      1.0,         1.0};
  const Doubles shifted = x * kLog2E + kRound;
  const Doubles n = shifted - kRound;
  const Doubles r = (x - n * kLn2High) - n * kLn2Low;
  Doubles sum = r * kInverseFactorials[0] + kInverseFactorials[1];
#pragma GCC unroll 16
  for (size_t i = 2; i < std::size(kInverseFactorials); ++i) sum = sum * r + kInverseFactorials[i];
  return std::bit_cast<Doubles>(std::bit_cast<Longs>(sum) + (std::bit_cast<Longs>(shifted) << 52));
}

MILLRACE_INLINE void WeighEight(const float* logits, double best, double inverse_temperature, double* weights,
                                uint8_t* buckets) {
  HalfFloats narrow;
  std::memcpy(&narrow, logits, sizeof(narrow));
  const Doubles x = (__builtin_convertvector(narrow, Doubles) - best) * inverse_temperature;
  const Longs counts = x >= kExponentMin;  // -1 or 0; 0 where x is no number
  const Doubles zero{};
  const Doubles exponent = counts ? x : zero;
  const Doubles weight = counts ? Exp(exponent) : zero;
  std::memcpy(weights, &weight, sizeof(weight));
  const Doubles level = exponent * ((kNumBuckets - 1) / kExponentMin);
  const Doubles none = zero + kNoBucket;
  const Bytes bucket = __builtin_convertvector(__builtin_convertvector(counts ? level : none, Ints), Bytes);
  std::memcpy(buckets, &bucket, sizeof(bucket));
}

MILLRACE_INLINE void WeighIn(std::span<const float> logits, float best, double inverse_temperature,
                             double* weights, uint8_t* buckets) {
  const auto wide = static_cast<double>(best);
  size_t i = 0;
  for (; i + kDoubles <= logits.size(); i += kDoubles)
    WeighEight(logits.data() + i, wide, inverse_temperature, weights + i, buckets + i);
  if (i == logits.size()) return;
  float rest[kDoubles] = {};
  double rest_weights[kDoubles];
  uint8_t rest_buckets[kDoubles];
  const size_t count = logits.size() - i;
  std::copy_n(logits.data() + i, count, rest);
  WeighEight(rest, wide, inverse_temperature, rest_weights, rest_buckets);
  std::copy_n(rest_weights, count, weights + i);
  std::copy_n(rest_buckets, count, buckets + i);
}

// One entry per instruction set, each with the same two bodies.
#define MILLRACE_KERNELS(name, target)                                                           \
  target int32_t ArgMax##name(std::span<const float> logits) { return ArgMaxIn(logits); }        \
  target void Weigh##name(std::span<const float> logits, float best, double inverse_temperature, \
                          double* weights, uint8_t* buckets) {                                   \
    WeighIn(logits, best, inverse_temperature, weights, buckets);                                \
  }                                                                                              \
  constexpr LogitKernels k##name = {#name, ArgMax##name, Weigh##name};

MILLRACE_KERNELS(Portable, )
#if defined(__x86_64__)
MILLRACE_KERNELS(Avx2, __attribute__((target("avx2"))))
MILLRACE_KERNELS(Avx512, __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq"))))
#endif

std::vector<LogitKernels> Runnable() {
  std::vector<LogitKernels> kernels;
#if defined(__x86_64__)
  if (GetCpuFeatures().avx512) kernels.push_back(kAvx512);
  if (GetCpuFeatures().avx2_fma) kernels.push_back(kAvx2);
#endif
  kernels.push_back(kPortable);
  return kernels;
}

}  // namespace

std::span<const LogitKernels> RunnableLogitKernels() {
  static const std::vector<LogitKernels> kernels = Runnable();
  return kernels;
}

}  // namespace millrace::engine
