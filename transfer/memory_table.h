#pragma once
// What memory there is and who may write to it: regions and tickets. Thread-safe; knows no sockets.
//
// The receiver's fence: a slice is admitted (its ticket pinned) before a byte of it lands and unpinned when
// none of it can land any more. A closed ticket admits nothing, and is drained when its last pin goes.

#include <mutex>
#include <span>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "transfer/transfer.h"

namespace millrace::transfer {

class MemoryTable {
 public:
  RegionId Register(std::span<std::byte> memory, bool writable);
  Status Deregister(RegionId region);

  // Sender: the bytes of a range, counted as in use until ReleaseSource. InvalidArgument outside the region.
  StatusOr<std::span<const std::byte>> UseSource(const Range& range);
  void ReleaseSource(RegionId region);

  // Receiver.
  StatusOr<TicketId> Open(uint64_t peer_epoch, std::vector<Range> ranges);
  Status Extend(TicketId ticket, std::vector<Range> ranges);
  // `done` runs here when nothing is pinned, else in the Unpin that takes the last pin.
  void Close(TicketId ticket, TicketDone done);
  // Where a slice may land. The ticket is pinned on success. PermissionDenied says what is missing.
  StatusOr<std::byte*> Admit(uint64_t peer_epoch, TicketId ticket, RegionId region, uint64_t offset,
                             uint32_t length);
  void Unpin(TicketId ticket);
  bool IsClosing(TicketId ticket) const;
  void CloseAll();  // every ticket; their waiters run as pins go
  int32_t num_open() const;

 private:
  struct Region {
    std::span<std::byte> memory;
    bool writable = false;
    int32_t uses = 0;  // tickets and writes that name it
  };
  struct Ticket {
    uint64_t peer_epoch = 0;
    std::vector<Range> ranges;  // sorted, neighbours joined
    int32_t pins = 0;
    bool closing = false;
    std::vector<TicketDone> waiting;
  };
  Status AddRanges(Ticket& ticket, std::vector<Range> ranges);
  std::vector<TicketDone> RemoveIfDrained(TicketId id);

  mutable std::mutex mutex_;
  absl::flat_hash_map<RegionId, Region> regions_;
  absl::flat_hash_map<TicketId, Ticket> tickets_;
  RegionId next_region_ = 1;
  TicketId next_ticket_ = 1;
};

}  // namespace millrace::transfer
