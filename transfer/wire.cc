#include "transfer/wire.h"

#include <cstring>

#include "base/digest.h"

namespace millrace::transfer {
namespace {

constexpr uint32_t kMagic = 0x4c53524d;  // "MRSL"

static_assert(std::endian::native == std::endian::little, "the wire format is the machine's own order");

// Field offsets of the header. The header's own checksum covers all before it; 56..59 are zero.
constexpr size_t kMagicAt = 0, kKindAt = 4, kCodeAt = 6, kSliceAt = 8, kTicketAt = 16, kOffsetAt = 24,
                 kRegionAt = 32, kLengthAt = 36, kPayloadCrcAt = 40, kAttemptAt = 44, kRetiredAt = 48,
                 kHeaderCrcAt = 60;
constexpr uint16_t kKindMax = 7, kCodeMax = 3;
constexpr uint32_t kControlLengthMax = 64 << 10;

template <typename T>
void Put(HeaderBytes& bytes, size_t at, T value) {
  std::memcpy(bytes.data() + at, &value, sizeof(value));
}

template <typename T>
T Get(const HeaderBytes& bytes, size_t at) {
  T value;
  std::memcpy(&value, bytes.data() + at, sizeof(value));
  return value;
}

uint32_t HeaderCrc(const HeaderBytes& bytes) { return Crc32c(std::span(bytes).first(kHeaderCrcAt)); }

}  // namespace

HeaderBytes EncodeFrame(const Frame& frame) {
  HeaderBytes bytes{};
  Put(bytes, kMagicAt, kMagic);
  Put(bytes, kKindAt, static_cast<uint16_t>(frame.kind));
  Put(bytes, kCodeAt, static_cast<uint16_t>(frame.code));
  Put(bytes, kSliceAt, frame.slice);
  Put(bytes, kTicketAt, frame.ticket);
  Put(bytes, kOffsetAt, frame.offset);
  Put(bytes, kRegionAt, frame.region);
  Put(bytes, kLengthAt, frame.length);
  Put(bytes, kPayloadCrcAt, frame.payload_crc);
  Put(bytes, kAttemptAt, frame.attempt);
  Put(bytes, kRetiredAt, frame.retired_below);
  Put(bytes, kHeaderCrcAt, HeaderCrc(bytes));
  return bytes;
}

StatusOr<Frame> DecodeFrame(const HeaderBytes& bytes) {
  if (Get<uint32_t>(bytes, kMagicAt) != kMagic) return DataLoss("not a transfer frame");
  if (Get<uint32_t>(bytes, kHeaderCrcAt) != HeaderCrc(bytes)) return DataLoss("a frame header is damaged");
  Frame frame;
  const auto kind = Get<uint16_t>(bytes, kKindAt);
  const auto code = Get<uint16_t>(bytes, kCodeAt);
  if (kind < 1 || kind > kKindMax || code > kCodeMax)
    return DataLoss("unknown frame kind {} or code {}", kind, code);
  frame.kind = static_cast<FrameKind>(kind);
  frame.code = static_cast<SliceCode>(code);
  frame.slice = Get<uint64_t>(bytes, kSliceAt);
  frame.ticket = Get<uint64_t>(bytes, kTicketAt);
  frame.offset = Get<uint64_t>(bytes, kOffsetAt);
  frame.region = Get<uint32_t>(bytes, kRegionAt);
  frame.length = Get<uint32_t>(bytes, kLengthAt);
  frame.payload_crc = Get<uint32_t>(bytes, kPayloadCrcAt);
  frame.attempt = Get<uint32_t>(bytes, kAttemptAt);
  frame.retired_below = Get<uint64_t>(bytes, kRetiredAt);
  const bool slice = frame.kind == FrameKind::kSlice || frame.kind == FrameKind::kReadData ||
                     frame.kind == FrameKind::kReadRequest;
  if (slice && (frame.length == 0 || frame.length > kSliceBytesLimit))
    return DataLoss("a slice of {} bytes", frame.length);
  if (frame.kind == FrameKind::kControl && frame.length > kControlLengthMax)
    return DataLoss("a control message of {} bytes", frame.length);
  return frame;
}

std::string WithLength(const std::string& message) {
  const auto size = static_cast<uint32_t>(message.size());
  std::string out(sizeof(size), '\0');
  std::memcpy(out.data(), &size, sizeof(size));
  return out + message;
}

}  // namespace millrace::transfer
