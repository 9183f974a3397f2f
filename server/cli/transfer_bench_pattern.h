#pragma once
// Bytes that say where they belong and when they were written, so that a byte in the wrong place, from the
// wrong initiator, or left over from an earlier round is seen.

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <span>

namespace millrace::server {

// What lies at a place of an initiator's area in one round. `offset` and lengths are multiples of 8.
class BenchPattern {
 public:
  BenchPattern(uint64_t seed, uint64_t round) : key_(seed ^ (round * 0x9e3779b97f4a7c15ULL)) {}

  void Fill(std::span<std::byte> bytes, uint64_t offset) const {
    uint64_t word = First(offset);
    for (size_t i = 0; i < bytes.size(); i += sizeof(word), word += kStep) {
      const uint64_t value = word ^ key_;
      std::memcpy(bytes.data() + i, &value, sizeof(value));
    }
  }

  // Bytes that differ from the pattern.
  uint64_t CountWrong(std::span<const std::byte> bytes, uint64_t offset) const {
    uint64_t wrong_words = 0;
    uint64_t word = First(offset);
    for (size_t i = 0; i < bytes.size(); i += sizeof(word), word += kStep) {
      uint64_t value = 0;
      std::memcpy(&value, bytes.data() + i, sizeof(value));
      wrong_words += value != (word ^ key_) ? 1 : 0;
    }
    return wrong_words * sizeof(uint64_t);
  }

 private:
  static constexpr uint64_t kStep = 0xd1342543de82ef95ULL;  // odd: no two words of an area are alike
  static uint64_t First(uint64_t offset) { return (offset / sizeof(uint64_t)) * kStep; }
  const uint64_t key_;
};

}  // namespace millrace::server
