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

  // Submitter: where each intent's local bytes begin, and the regions they are in, counted as in use until
  // ReleaseLocal. `writable`: all of those may be written to. InvalidArgument for an empty range or one
  // outside its region; then nothing is in use.
  Status UseLocal(std::span<const Intent> intents, std::vector<std::byte*>* bases,
                  std::vector<RegionId>* regions, bool* writable);
  void ReleaseLocal(std::span<const RegionId> regions);

  // Owner.
  StatusOr<TicketId> Open(uint64_t peer_epoch, std::vector<Range> ranges,
                          Operation operation = Operation::kWrite);
  Status Extend(TicketId ticket, std::vector<Range> ranges);
  // `done` runs here when nothing is pinned, else in the Unpin that takes the last pin; then the answer is
  // true and kinds of rail are to be told.
  bool Close(TicketId ticket, TicketDone done);
  // Where a slice may land, or may be read from. The ticket is pinned on success. PermissionDenied says what
  // is missing.
  StatusOr<std::byte*> Admit(uint64_t peer_epoch, TicketId ticket, Operation operation, RegionId region,
                             uint64_t offset, uint32_t length);
  // For rails on which the peer moves bytes by itself: one pin for as long as it may, and what it may touch.
  struct Grant {
    Operation operation = Operation::kWrite;
    std::vector<Range> ranges;  // sorted, neighbours joined; an extended ticket has more later
  };
  StatusOr<Grant> PinTicket(uint64_t peer_epoch, TicketId ticket);
  void Unpin(TicketId ticket);
  bool IsClosing(TicketId ticket) const;
  std::vector<TicketId>
  CloseAll();  // every ticket; their waiters run as pins go. Those that are pinned still.
  int32_t num_open() const;
  int32_t num_draining() const;  // closed and pinned

 private:
  struct Region {
    std::span<std::byte> memory;
    bool writable = false;
    int32_t uses = 0;  // tickets and intent lists that name it
  };
  struct Ticket {
    uint64_t peer_epoch = 0;
    Operation operation = Operation::kWrite;
    std::vector<Range> ranges;  // sorted, neighbours joined
    int32_t pins = 0;
    bool closing = false;
    std::vector<TicketDone> waiting;
  };
  StatusOr<Ticket*> FindOpen(uint64_t peer_epoch, TicketId ticket);
  Status AddRanges(Ticket& ticket, std::vector<Range> ranges);
  std::vector<TicketDone> RemoveIfDrained(TicketId id);

  mutable std::mutex mutex_;
  absl::flat_hash_map<RegionId, Region> regions_;
  absl::flat_hash_map<TicketId, Ticket> tickets_;
  RegionId next_region_ = 1;
  TicketId next_ticket_ = 1;
};

}  // namespace millrace::transfer
