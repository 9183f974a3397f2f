#pragma once
// Packed weights on disk, so that a second start only reads. One file per (source, formats):
// "<key>.millrace", with a header, a digest per block of 16 MiB, and the bytes as they lie in memory.
//
//   magic "MRWCACH1", u64 packing version, u64 bytes, 32 characters of key, u64 digest of all that is above
//   and of the block digests; u64 digest per block; padding to 4 KiB; the bytes
//
// Numbers are little-endian. A file is written beside its place and renamed, so that a reader sees all of it
// or none.

#include <span>
#include <string>

#include "engine/backend/cpu/cpu_backend.h"
#include "engine/backend/cpu/kernels.h"

namespace millrace::engine {

// `options` must outlive it. Loading thread.
class WeightCache {
 public:
  WeightCache(const CpuWeightsOptions& options, Precision precision, WeightFormat format);
  // Fills `memory` from the file. False, with a line in the log where a file is there, if it cannot be
  // trusted.
  bool Read(std::span<std::byte> memory) const;
  // Keeps `memory`. A failure is logged.
  void Write(std::span<const std::byte> memory) const;

 private:
  Status ReadFrom(const std::string& path, std::span<std::byte> memory) const;
  Status WriteTo(const std::string& path, std::span<const std::byte> memory) const;

  const CpuWeightsOptions& options_;
  std::string key_;   // 32 hexadecimal characters
  std::string path_;  // empty: no cache
};

}  // namespace millrace::engine
