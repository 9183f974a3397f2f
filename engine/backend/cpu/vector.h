#pragma once
// 16 floats in the compiler's own vector types: one AVX-512 register, two AVX2 registers or four SSE
// registers. For the kernel files only; the including file names its namespace and tile sizes before it
// includes this.

#include <cstdint>
#include <cstring>

#ifndef MILLRACE_KERNEL_NAMESPACE
#error "include this from kernels_<isa>.cc"
#endif
#define MILLRACE_INLINE inline __attribute__((always_inline))

namespace millrace::engine::MILLRACE_KERNEL_NAMESPACE {

using V16 = float __attribute__((vector_size(64)));
using I16x32 = int32_t __attribute__((vector_size(64)));
using U16x32 = uint32_t __attribute__((vector_size(64)));
using U16x16 = uint16_t __attribute__((vector_size(32)));
using D16 = double __attribute__((vector_size(128)));

template <typename To, typename From>
MILLRACE_INLINE To Bits(const From& from) {
  To to;
  static_assert(sizeof(To) == sizeof(From));
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

MILLRACE_INLINE V16 Splat(float x) { return x - V16{}; }

MILLRACE_INLINE V16 Load(const float* p) {
  V16 v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}

MILLRACE_INLINE void Store(float* p, const V16& v) { std::memcpy(p, &v, sizeof(v)); }

// The same value, which no compiler may contract with what is done to it next: where a product starts a chain
// of multiply-adds, either could be fused, and every tile has to do the same.
template <typename T>
MILLRACE_INLINE T Rounded(T value) {
  __asm__("" : "+m"(value));
  return value;
}

// One tree, the same everywhere.
MILLRACE_INLINE float Sum(const V16& v) {
  float lanes[16];
  std::memcpy(lanes, &v, sizeof(lanes));
  for (int width = 8; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) lanes[i] += lanes[i + width];
  }
  return lanes[0];
}

MILLRACE_INLINE float Max(const V16& v) {
  float lanes[16];
  std::memcpy(lanes, &v, sizeof(lanes));
  for (int width = 8; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) lanes[i] = lanes[i] > lanes[i + width] ? lanes[i] : lanes[i + width];
  }
  return lanes[0];
}

MILLRACE_INLINE V16 Max(const V16& a, const V16& b) { return a > b ? a : b; }

#define MILLRACE_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)

// 16 x 16 in registers: pairs, then quads, then 128-bit quarters of rows 4 and 8 apart.
MILLRACE_INLINE void Transpose16(V16 (&r)[16]) {
  V16 t[16];
  for (int i = 0; i < 16; i += 2) {
    t[i] = MILLRACE_SHUFFLE(r[i], r[i + 1], 0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29);
    t[i + 1] = MILLRACE_SHUFFLE(r[i], r[i + 1], 2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11, 27, 14, 30, 15, 31);
  }
  for (int i = 0; i < 16; i += 4) {
    for (int h = 0; h < 2; ++h) {
      const V16 a = t[i + h];
      const V16 b = t[i + h + 2];
      r[i + 2 * h] = MILLRACE_SHUFFLE(a, b, 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29);
      r[i + 2 * h + 1] = MILLRACE_SHUFFLE(a, b, 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31);
    }
  }
  for (int i = 0; i < 4; ++i) {
    for (int h = 0; h < 2; ++h) {
      const V16 a = r[8 * h + i];
      const V16 b = r[8 * h + i + 4];
      t[8 * h + i] = MILLRACE_SHUFFLE(a, b, 0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27);
      t[8 * h + i + 4] = MILLRACE_SHUFFLE(a, b, 4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28, 29, 30, 31);
    }
  }
  for (int i = 0; i < 8; ++i) {
    const V16 a = t[i];
    const V16 b = t[i + 8];
    r[i] = MILLRACE_SHUFFLE(a, b, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23);
    r[i + 8] = MILLRACE_SHUFFLE(a, b, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
  }
}
#undef MILLRACE_SHUFFLE

constexpr float kRound =
    12582912.0f;  // 1.5 * 2^23: adding it leaves the nearest integer in the low mantissa bits

// e^x to about 2 ulp: 2^n times a polynomial on [-ln2 / 2, ln2 / 2] (the classic reduction, Cody and Waite
// 1980). 0 below -87.3, and e^88 above 88.
MILLRACE_INLINE V16 Exp(const V16& x) {
  const V16 low = Splat(-87.3f);
  const V16 high = Splat(88.0f);
  V16 clamped = x > low ? x : low;
  clamped = clamped < high ? clamped : high;
  const V16 shifted = clamped * 1.44269504f + kRound;
  const V16 n = shifted - kRound;
  V16 r = clamped - n * 0.693145752f;
  r = r - n * 1.42860677e-6f;
  V16 p = r * 1.98412698e-4f + 1.38888889e-3f;
  p = p * r + 8.33333333e-3f;
  p = p * r + 4.16666667e-2f;
  p = p * r + 1.66666667e-1f;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  const I16x32 exponent = Bits<I16x32>(shifted) - Bits<int32_t>(kRound);
  const V16 power = Bits<V16>((exponent + 127) << 23);
  const V16 e = p * power;
  return x >= low ? e : V16{};
}

}  // namespace millrace::engine::MILLRACE_KERNEL_NAMESPACE
