#include "transfer/rdma/frames.h"

#include <cstring>

namespace millrace::transfer::rdma {
namespace {

constexpr uint16_t kMagic = 0x4d52;  // "RM"
constexpr size_t kMagicAt = 0, kKindAt = 2, kFlagsAt = 3, kSlotAt = 4;
// Requests.
constexpr size_t kTicketAt = 8, kOffsetAt = 16, kSliceAt = 24, kRetiredAt = 32, kRegionAt = 40,
                 kLengthAt = 44, kAttemptAt = 48;
// Answers, and probes.
constexpr size_t kAddressAt = 8, kKeyAt = 16, kNumberAt = 8;

template <typename T>
void Put(FrameBytes& bytes, size_t at, T value) {
  std::memcpy(bytes.data() + at, &value, sizeof(value));
}

template <typename T>
void Get(std::span<const std::byte> bytes, size_t at, T* value) {
  std::memcpy(value, bytes.data() + at, sizeof(*value));
}

}  // namespace

FrameBytes Encode(const Frame& frame) {
  FrameBytes bytes{};
  Put(bytes, kMagicAt, kMagic);
  Put(bytes, kKindAt, frame.kind);
  Put(bytes, kSlotAt, frame.slot);
  switch (frame.kind) {
    case FrameKind::kRequest:
      Put(bytes, kFlagsAt, static_cast<uint8_t>(frame.read));
      Put(bytes, kTicketAt, frame.ticket);
      Put(bytes, kOffsetAt, frame.offset);
      Put(bytes, kSliceAt, frame.slice);
      Put(bytes, kRetiredAt, frame.retired_below);
      Put(bytes, kRegionAt, frame.region);
      Put(bytes, kLengthAt, frame.length);
      Put(bytes, kAttemptAt, frame.attempt);
      break;
    case FrameKind::kAnswer:
      Put(bytes, kFlagsAt, frame.verdict);
      Put(bytes, kAddressAt, frame.address);
      Put(bytes, kKeyAt, frame.key);
      break;
    case FrameKind::kRelease:
      break;
    case FrameKind::kProbe:
    case FrameKind::kProbeAnswer:
      Put(bytes, kNumberAt, frame.number);
      break;
  }
  return bytes;
}

StatusOr<Frame> Decode(std::span<const std::byte> bytes) {
  if (bytes.size() != kFrameBytes) return DataLoss("a frame of {} bytes", bytes.size());
  uint16_t magic = 0;
  uint8_t kind = 0;
  uint8_t flags = 0;
  Frame frame;
  Get(bytes, kMagicAt, &magic);
  Get(bytes, kKindAt, &kind);
  Get(bytes, kFlagsAt, &flags);
  Get(bytes, kSlotAt, &frame.slot);
  if (magic != kMagic || kind < 1 || kind > 5) return DataLoss("not a frame of a link: kind {}", kind);
  if (frame.slot >= kSlots) return DataLoss("a frame for slot {}", frame.slot);
  frame.kind = static_cast<FrameKind>(kind);
  const uint8_t flags_max = frame.kind == FrameKind::kAnswer ? 2 : frame.kind == FrameKind::kRequest ? 1 : 0;
  if (flags > flags_max) return DataLoss("a frame of kind {} with flags {}", kind, flags);
  switch (frame.kind) {
    case FrameKind::kRequest:
      frame.read = flags != 0;
      Get(bytes, kTicketAt, &frame.ticket);
      Get(bytes, kOffsetAt, &frame.offset);
      Get(bytes, kSliceAt, &frame.slice);
      Get(bytes, kRetiredAt, &frame.retired_below);
      Get(bytes, kRegionAt, &frame.region);
      Get(bytes, kLengthAt, &frame.length);
      Get(bytes, kAttemptAt, &frame.attempt);
      if (frame.length == 0 || frame.length > kSliceBytesMax)
        return DataLoss("a slice of {} bytes", frame.length);
      if (frame.attempt == 0) return DataLoss("a slice of attempt 0");
      break;
    case FrameKind::kAnswer:
      frame.verdict = static_cast<Verdict>(flags);
      Get(bytes, kAddressAt, &frame.address);
      Get(bytes, kKeyAt, &frame.key);
      break;
    case FrameKind::kRelease:
      break;
    case FrameKind::kProbe:
    case FrameKind::kProbeAnswer:
      Get(bytes, kNumberAt, &frame.number);
      break;
  }
  return frame;
}

}  // namespace millrace::transfer::rdma
