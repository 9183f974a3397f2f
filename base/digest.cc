#include "base/digest.h"

#include <fmt/core.h>
#include <xxhash.h>

#include <array>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace millrace {
namespace {

constexpr std::array<uint32_t, 256> MakeTable() {
  std::array<uint32_t, 256> table{};
  for (uint32_t i = 0; i < 256; ++i) {
    uint32_t crc = i;
    for (int bit = 0; bit < 8; ++bit) crc = (crc & 1U) ? (crc >> 1) ^ 0x82f63b78U : crc >> 1;
    table[i] = crc;
  }
  return table;
}

uint32_t Crc32cTable(const unsigned char* data, size_t size, uint32_t crc) {
  static constexpr auto kTable = MakeTable();
  for (size_t i = 0; i < size; ++i) crc = kTable[(crc ^ data[i]) & 0xffU] ^ (crc >> 8);
  return crc;
}

#if defined(__x86_64__)
__attribute__((target("sse4.2"))) uint32_t Crc32cHardware(const unsigned char* data, size_t size,
                                                          uint32_t crc) {
  uint64_t wide = crc;
  for (; size >= 8; size -= 8, data += 8) {
    uint64_t word;
    std::memcpy(&word, data, 8);
    wide = _mm_crc32_u64(wide, word);
  }
  auto narrow = static_cast<uint32_t>(wide);
  for (; size > 0; --size, ++data) narrow = _mm_crc32_u8(narrow, *data);
  return narrow;
}

// Folding by carry-less multiplication (Gopal et al., "Fast CRC computation using PCLMULQDQ", Intel 2009),
// 256 bytes at a time in 512-bit registers: a 128-bit lane that stands `bits` before another is carried over
// to it by multiplying its halves with x^(bits +- 32) mod P. The last 16 bytes that are left are congruent to
// all of the data.
struct Fold {
  uint64_t low, high;
};

constexpr uint64_t FoldConstant(int power) {
  uint32_t value = 1;  // x^0
  for (int i = 0; i < power; ++i) value = (value << 1) ^ ((value >> 31) != 0 ? 0x1edc6f41U : 0U);
  uint64_t reflected = 0;
  for (int bit = 0; bit < 32; ++bit) reflected |= uint64_t{(value >> bit) & 1U} << (31 - bit);
  return reflected << 1;
}
constexpr Fold FoldBy(int bits) { return {FoldConstant(bits + 32), FoldConstant(bits - 32)}; }

__attribute__((target("avx512f,vpclmulqdq,sse4.2"))) inline __m512i Carry(__m512i from, __m512i factor,
                                                                          __m512i onto) {
  // 0x96: the exclusive or of all three.
  return _mm512_ternarylogic_epi64(_mm512_clmulepi64_epi128(from, factor, 0x00),
                                   _mm512_clmulepi64_epi128(from, factor, 0x11), onto, 0x96);
}

__attribute__((target("avx512f,vpclmulqdq,sse4.2"))) inline __m512i Factor(Fold fold) {
  const auto low = static_cast<int64_t>(fold.low), high = static_cast<int64_t>(fold.high);
  return _mm512_set_epi64(high, low, high, low, high, low, high, low);
}

// size >= 256.
constexpr size_t kPrefetchBytes = 1024;

__attribute__((target("avx512f,vpclmulqdq,pclmul,sse4.2"))) uint32_t Crc32cWide(const unsigned char* data,
                                                                                size_t size, uint32_t crc) {
  static constexpr Fold kBy2048 = FoldBy(2048), kBy512 = FoldBy(512), kBy128 = FoldBy(128);
  __m512i x[4];
  for (int i = 0; i < 4; ++i) x[i] = _mm512_loadu_si512(data + 64 * i);
  x[0] = _mm512_xor_si512(x[0], _mm512_zextsi128_si512(_mm_cvtsi32_si128(static_cast<int>(crc))));
  data += 256, size -= 256;
  const __m512i by2048 = Factor(kBy2048);
  for (; size >= 256; size -= 256, data += 256) {
    for (int i = 0; i < 4; ++i) {
      // The processor's own prefetching leaves a sixth of the speed on data that is in no cache.
      _mm_prefetch(reinterpret_cast<const char*>(data) + kPrefetchBytes + 64 * i, _MM_HINT_T0);
      x[i] = Carry(x[i], by2048, _mm512_loadu_si512(data + 64 * i));
    }
  }
  const __m512i by512 = Factor(kBy512);
  __m512i all = x[0];
  for (int i = 1; i < 4; ++i) all = Carry(all, by512, x[i]);
  for (; size >= 64; size -= 64, data += 64) all = Carry(all, by512, _mm512_loadu_si512(data));
  const __m128i by128 = _mm_set_epi64x(static_cast<int64_t>(kBy128.high), static_cast<int64_t>(kBy128.low));
  alignas(64) __m128i lanes[4];
  _mm512_store_si512(lanes, all);
  __m128i last = lanes[0];
  for (int i = 1; i < 4; ++i) {
    const __m128i lane = lanes[i];
    last = _mm_xor_si128(lane, _mm_xor_si128(_mm_clmulepi64_si128(last, by128, 0x00),
                                             _mm_clmulepi64_si128(last, by128, 0x11)));
  }
  uint64_t wide = _mm_crc32_u64(0, static_cast<uint64_t>(_mm_cvtsi128_si64(last)));
  wide = _mm_crc32_u64(wide, static_cast<uint64_t>(_mm_extract_epi64(last, 1)));
  return Crc32cHardware(data, size, static_cast<uint32_t>(wide));
}
#endif

}  // namespace

uint32_t Crc32c(std::span<const std::byte> data, uint32_t crc) {
  const auto* bytes = reinterpret_cast<const unsigned char*>(data.data());
#if defined(__x86_64__)
  static const bool wide = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("vpclmulqdq");
  if (wide && data.size() >= 256) return ~Crc32cWide(bytes, data.size(), ~crc);
  static const bool hardware = __builtin_cpu_supports("sse4.2");
  if (hardware) return ~Crc32cHardware(bytes, data.size(), ~crc);
#endif
  return ~Crc32cTable(bytes, data.size(), ~crc);
}

uint64_t Xxh3(std::span<const std::byte> data, uint64_t seed) {
  return XXH3_64bits_withSeed(data.data(), data.size(), seed);
}

std::string Xxh3Hex(std::span<const std::byte> data) {
  const XXH128_hash_t hash = XXH3_128bits(data.data(), data.size());
  return fmt::format("{:016x}{:016x}", hash.high64, hash.low64);
}

}  // namespace millrace
