#pragma once
// Checksums. Crc32c guards one message on a wire; Xxh3 is for content digests.

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>

namespace millrace {

// CRC-32C (Castagnoli), with the processor's instruction where there is one. Chain calls through `crc`.
uint32_t Crc32c(std::span<const std::byte> data, uint32_t crc = 0);

// XXH3-64 of `data`; the seed is part of the result.
uint64_t Xxh3(std::span<const std::byte> data, uint64_t seed = 0);

// XXH3-128 of `data` as 32 hexadecimal characters.
std::string Xxh3Hex(std::span<const std::byte> data);

inline std::span<const std::byte> AsBytes(const std::string& text) {
  return std::as_bytes(std::span(text.data(), text.size()));
}

}  // namespace millrace
