#pragma once
// One piece of a request on its way, as every layer of the sending side sees it. Plain data.

#include <span>

#include "transfer/transfer.h"

namespace millrace::transfer {

// A request of at most so many bytes is express.
inline constexpr uint64_t kExpressBytesMax = 64 << 10;

struct Slice {
  uint64_t id = 0;       // unique for this process's peer; copies of the same slice share it
  uint32_t attempt = 1;  // counts copies: the receiver lets nothing of an earlier one land after a later one
  uint64_t request = 0;
  Operation operation = Operation::kWrite;
  // Bytes of this process: read from by a write, landed in by a read. Valid until the last copy is terminal.
  std::span<std::byte> local;
  RegionId local_region = 0;
  TicketId ticket = 0;
  RegionId remote_region = 0;
  uint64_t remote_offset = 0;
  bool express = false;        // all of a small request, or part of it: may pass bulk
  uint64_t retired_below = 0;  // every slice with a smaller id is terminal in every copy
};

// What became of one copy. All of them mean: nothing of this copy reads or writes `local` any more.
enum class SliceOutcome {
  kLanded,       // the bytes are in place and their checksum was right
  kBadChecksum,  // they are not: send it again
  kRefused,      // by the owner of the memory: no ticket, another epoch, a range that was not granted
  kUnknown,      // it may or may not have landed, or a later copy took over: another path may take it
};

}  // namespace millrace::transfer
