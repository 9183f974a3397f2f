#pragma once
// What travels on a connection between two transfer engines. First, in both directions, one length-prefixed
// Hello (transfer.proto); then frames with this header, little-endian, fixed size. Slices, read data and
// control messages are followed by their payload.

#include <array>
#include <cstddef>
#include <cstdint>
#include <span>
#include <string>

#include "base/status.h"

namespace millrace::transfer {

inline constexpr uint32_t kProtocolVersion = 2;
inline constexpr uint32_t kHelloBytesMax = 4096;
inline constexpr uint32_t kSliceBytesLimit = 16U << 20;  // no frame carries more, whatever the options say
inline constexpr size_t kHeaderBytes = 64;

enum class FrameKind : uint16_t {
  kSlice = 1,   // + payload: write it
  kAnswer = 2,  // to a slice, or to a read that is refused
  kProbe = 3,   // `slice` is a number that the answer repeats
  kProbeAnswer = 4,
  kReadRequest = 5,  // length says how much; no payload
  kReadData = 6,     // + payload
  kControl = 7,      // + payload: a RailMessage; control sessions only
};

// How the owner of the memory answers a slice.
enum class SliceCode : uint16_t {
  kLanded = 0,       // every byte is in memory and its checksum was right
  kBadChecksum = 1,  // bytes landed wrong: send it again
  kRefused = 2,      // no ticket, another epoch, or a range that was not granted: nothing landed
  kSuperseded = 3,   // a later copy of the same slice has come: this one did not land whole
};

struct Frame {
  FrameKind kind = FrameKind::kSlice;
  SliceCode code = SliceCode::kLanded;  // answers
  uint64_t slice = 0;                   // the sender's number; answers repeat it
  uint64_t ticket = 0;
  uint32_t region = 0;  // the receiver's
  uint32_t length = 0;  // of the payload, or to be read
  uint64_t offset = 0;
  uint32_t payload_crc = 0;    // CRC-32C
  uint32_t attempt = 1;        // of slices: which copy; see landing.h
  uint64_t retired_below = 0;  // of slices
};

// Whether `length` bytes follow the header.
inline bool HasPayload(FrameKind kind) {
  return kind == FrameKind::kSlice || kind == FrameKind::kReadData || kind == FrameKind::kControl;
}

using HeaderBytes = std::array<std::byte, kHeaderBytes>;
HeaderBytes EncodeFrame(const Frame& frame);
// DataLoss for a wrong magic number, header checksum, kind or length: the connection cannot be trusted any
// more.
StatusOr<Frame> DecodeFrame(const HeaderBytes& bytes);

// A Hello with its length prefix.
std::string WithLength(const std::string& message);

}  // namespace millrace::transfer
