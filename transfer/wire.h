#pragma once
// What travels on a connection between two transfer engines. First, in both directions, one length-prefixed
// Hello (transfer.proto); then frames with this header, little-endian, fixed size. Slices are followed by
// their payload.

#include <array>
#include <cstddef>
#include <cstdint>
#include <span>
#include <string>

#include "base/status.h"

namespace millrace::transfer {

inline constexpr uint32_t kProtocolVersion = 1;
inline constexpr uint32_t kHelloBytesMax = 4096;
inline constexpr uint32_t kSliceBytesLimit = 16U << 20;  // no frame carries more, whatever the options say
inline constexpr size_t kHeaderBytes = 56;

enum class FrameKind : uint16_t { kSlice = 1, kAnswer = 2, kHeartbeat = 3, kHeartbeatAnswer = 4 };

// How a receiver answers a slice.
enum class SliceCode : uint16_t {
  kLanded = 0,       // every byte is in memory and its checksum was right
  kBadChecksum = 1,  // bytes landed wrong: send it again
  kRefused = 2,      // no ticket, another epoch, or a range that was not granted: nothing landed
};

struct Frame {
  FrameKind kind = FrameKind::kSlice;
  SliceCode code = SliceCode::kLanded;  // answers
  uint64_t slice = 0;                   // the sender's number; answers and heartbeats repeat it
  uint64_t ticket = 0;
  uint32_t region = 0;  // the receiver's
  uint32_t length = 0;  // of the payload
  uint64_t offset = 0;
  uint32_t payload_crc = 0;  // CRC-32C
};

using HeaderBytes = std::array<std::byte, kHeaderBytes>;
HeaderBytes EncodeFrame(const Frame& frame);
// DataLoss for a wrong magic number, header checksum, kind or length: the connection cannot be trusted any
// more.
StatusOr<Frame> DecodeFrame(const HeaderBytes& bytes);

// A Hello with its length prefix.
std::string WithLength(const std::string& message);

}  // namespace millrace::transfer
