#pragma once
// The quantiser of weights, a lane per row. Compiled without contraction: every instruction set rounds alike.

#include "engine/backend/cpu/kernels.h"
#include "engine/backend/cpu/vector.h"

namespace millrace::engine::MILLRACE_KERNEL_NAMESPACE {

// A group of 16 rows; lanes are rows.
struct Group {
  V16 columns[kGroupCols];
  V16 mean_square;
};

MILLRACE_INLINE V16 Select(const I16x32& condition, const V16& a, const V16& b) { return condition ? a : b; }

MILLRACE_INLINE void LoadGroup(const float* const* rows, Group* group) {
  for (int32_t first = 0; first < kGroupCols; first += 16) {
    V16 block[16];
    for (int r = 0; r < 16; ++r) block[r] = Load(rows[r] + first);
    Transpose16(block);
    for (int i = 0; i < 16; ++i) group->columns[first + i] = block[i];
  }
}

// Nearest bf16 of finite numbers, as fp32; ties to even.
MILLRACE_INLINE V16 RoundToBf16(const V16& x) {
  const U16x32 bits = Bits<U16x32>(x);
  return Bits<V16>((bits + 0x7fffU + ((bits >> 16) & 1U)) & 0xffff0000U);
}

// The integer next to x / scale in [low, high], as a float that has it in its low mantissa bits.
MILLRACE_INLINE V16 Shifted(const V16& x, const V16& inverse, float low, float high) {
  V16 code = x * inverse;
  code = Select(code > low, code, Splat(low));  // and where it is no number
  code = Select(code < high, code, Splat(high));
  return code + kRound;
}

MILLRACE_INLINE V16 WeightOf(const Group& group, const V16& x) { return x * x + group.mean_square; }

// The weighted squared error of the group with these scales.
inline V16 ErrorOf(const Group& group, const V16& scale) {
  const V16 inverse = 1.0f / scale;
  V16 sum = {};
  for (const V16& x : group.columns) {
    const V16 error = x - (Shifted(x, inverse, -8, 7) - kRound) * scale;
    sum += WeightOf(group, x) * (error * error);
  }
  return sum;
}

// With the codes of `scale`, the scale of least weighted squared error.
inline V16 Refitted(const Group& group, const V16& scale) {
  const V16 inverse = 1.0f / scale;
  V16 products = {};
  V16 squares = {};
  for (const V16& x : group.columns) {
    const V16 code = Shifted(x, inverse, -8, 7) - kRound;
    const V16 weighted = WeightOf(group, x) * code;
    products += weighted * x;
    squares += weighted * code;
  }
  return RoundToBf16(products / squares);
}

struct Range {
  V16 low;     // the least value, 0 at most
  V16 high;    // the greatest, 0 at least
  V16 finite;  // 0, or not a number if the row has an infinity or a NaN
};
MILLRACE_INLINE Range RangeOf(const Group& group) {
  Range range{};
  for (const V16& x : group.columns) {
    range.high = Select(x > range.high, x, range.high);
    range.low = Select(x < range.low, x, range.low);
    range.finite += x * 0.0f;
  }
  return range;
}

MILLRACE_INLINE void StoreScales(const V16& scale, uint16_t* scales) {
  const U16x16 narrow = __builtin_convertvector(Bits<U16x32>(scale) >> 16, U16x16);
  std::memcpy(scales, &narrow, sizeof(narrow));
}

// Code + offset of a column; the offset alone in rows whose scale is 0.
MILLRACE_INLINE U16x32 CodeOf(const V16& x, const V16& inverse, const I16x32& used, float low, float high,
                              int32_t offset) {
  const I16x32 code = Bits<I16x32>(Shifted(x, inverse, low, high)) - Bits<int32_t>(kRound);
  return Bits<U16x32>((used ? code : I16x32{}) + offset);
}

// The largest value becomes +-127.
inline void PackInt8(const float* const* rows, char* codes, uint16_t* scales) {
  Group group;
  LoadGroup(rows, &group);
  const Range range = RangeOf(group);
  const V16 largest = Max(range.high, -range.low);
  const I16x32 usable = (range.finite == 0.0f) & (largest > 0.0f);
  const V16 scale = Select(usable, RoundToBf16(largest / 127.0f), V16{});
  const I16x32 used = scale > 0.0f;
  const V16 inverse = 1.0f / scale;
  for (int q = 0; q < 16; ++q) {
    U16x32 quad = {};
    for (int i = 0; i < 4; ++i) {
      quad |= CodeOf(group.columns[4 * q + i], inverse, used, -127, 127, 128) << (8 * i);
    }
    std::memcpy(codes + 64 * q, &quad, sizeof(quad));
  }
  StoreScales(scale, scales);
}

constexpr float kSteps[] = {-8.0f, -8.7f, -9.4f, 7.0f, 7.6f};

// The value of largest magnitude becomes -8 of a range of [-8, 7] that may be mirrored; smaller scales, which
// clip it, are tried as well, and the best one is refitted to its codes. Errors are weighted by x^2 plus the
// row's mean of it: large weights matter more, since products with them do.
inline void PackInt4(const float* const* rows, char* codes, uint16_t* scales) {
  Group group;
  LoadGroup(rows, &group);
  const Range range = RangeOf(group);
  const V16 largest = Select(range.high >= -range.low, range.high, range.low);
  const I16x32 usable = (range.finite == 0.0f) & (largest != 0.0f);
  V16 squares = {};
  for (const V16& x : group.columns) squares += x * x;
  group.mean_square = squares * (1.0f / kGroupCols);
  V16 best = {};
  V16 best_error = {};
  for (const float steps : kSteps) {
    const V16 scale = RoundToBf16(largest / steps);
    const V16 error = ErrorOf(group, scale);
    // Errors of huge weights are beyond all numbers, and no scale is as small as some weights.
    const I16x32 better = usable & (scale != 0.0f) & ((best == 0.0f) | (error < best_error));
    best = Select(better, scale, best);
    best_error = Select(better, error, best_error);
  }
  const V16 refitted = Refitted(group, best);
  best =
      Select((ErrorOf(group, refitted) < best_error) & (refitted != 0.0f) & (best != 0.0f), refitted, best);
  const I16x32 used = best != 0.0f;
  const V16 inverse = 1.0f / best;
  for (int q = 0; q < 8; ++q) {  // quad q + 8 goes into the high half of quad q
    U16x32 quads = {};
    for (int i = 0; i < 4; ++i) {
      const U16x32 low = CodeOf(group.columns[4 * q + i], inverse, used, -8, 7, 8);
      const U16x32 high = CodeOf(group.columns[4 * (q + 8) + i], inverse, used, -8, 7, 8);
      quads |= (low | high << 4) << (8 * i);
    }
    std::memcpy(codes + 64 * q, &quads, sizeof(quads));
  }
  StoreScales(best, scales);
}

}  // namespace millrace::engine::MILLRACE_KERNEL_NAMESPACE
