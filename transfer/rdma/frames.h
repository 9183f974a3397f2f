#pragma once
// The small messages that two ends of a link SEND over their queue pairs, beside the data that is WRITTEN or
// READ past the other side's processor. 64 bytes, little-endian, always posted inline.
//
// One slice under a slot of its queue pair:
//   kRequest  initiator -> target   may I touch these bytes under this ticket?
//   kAnswer   target -> initiator   no, or their address and key; the ticket is pinned for this slot
//   then WRITE with the slot as immediate data, or READ and kRelease: the target unpins.
// A queue pair delivers in order, so the slot is free again as soon as its last message was posted.

#include <array>
#include <cstddef>
#include <cstdint>
#include <span>

#include "base/status.h"

namespace millrace::transfer::rdma {

inline constexpr size_t kFrameBytes = 64;
inline constexpr uint32_t kSlots = 32;  // slices in flight per queue pair; both ends size their queues by it
inline constexpr uint32_t kSliceBytesMax = 1U << 30;

enum class FrameKind : uint8_t { kRequest = 1, kAnswer = 2, kRelease = 3, kProbe = 4, kProbeAnswer = 5 };
enum class Verdict : uint8_t {
  kGranted = 0,
  kRefused = 1,     // no ticket, another epoch, or a range that was not granted
  kSuperseded = 2,  // a later copy of the slice came first
};

struct Frame {
  FrameKind kind = FrameKind::kProbe;
  uint32_t slot = 0;  // all but probes
  // kRequest
  bool read = false;
  uint64_t ticket = 0;
  uint32_t region = 0;  // the target's name
  uint64_t offset = 0;
  uint32_t length = 0;  // 1..kSliceBytesMax
  uint64_t slice = 0;   // the initiator's number, the copy's, and below which number nothing is in flight
  uint32_t attempt = 0;
  uint64_t retired_below = 0;
  // kAnswer
  Verdict verdict = Verdict::kGranted;
  uint64_t address = 0;
  uint32_t key = 0;
  // Probes; an answer repeats it.
  uint64_t number = 0;
};

using FrameBytes = std::array<std::byte, kFrameBytes>;
FrameBytes Encode(const Frame& frame);
// DataLoss for anything that Encode does not make.
StatusOr<Frame> Decode(std::span<const std::byte> bytes);

}  // namespace millrace::transfer::rdma
