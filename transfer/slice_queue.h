#pragma once
// What one peer is still owed: writes in order of priority, deadline and arrival, cut into slices only when a
// path takes one. Pure state; transfer thread only.

#include <deque>
#include <memory>
#include <set>
#include <span>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "transfer/memory_table.h"
#include "transfer/transfer.h"
#include "transfer/wire.h"

namespace millrace::transfer {

// One piece of a write on its way. Plain data; `bytes` stays valid until the write ends.
struct Slice {
  uint64_t id = 0;
  uint64_t write = 0;
  std::span<const std::byte> bytes;
  TicketId ticket = 0;
  RegionId remote_region = 0;
  uint64_t remote_offset = 0;
  int32_t bad_checksums = 0;
};

class SliceQueue {
 public:
  SliceQueue(MemoryTable* memory, uint32_t slice_bytes_max)
      : memory_(memory), slice_bytes_max_(slice_bytes_max) {}

  // Takes over the write, whose source ranges are in use already (UseSource). `sources` are their bytes.
  void Add(WriteRequest request, std::vector<std::span<const std::byte>> sources, WriteDone done);

  bool HasWork() const { return !resend_.empty() || !ready_.empty(); }
  // The next slice for a path that has room; HasWork() must be true.
  Slice Take();
  // A taken slice is terminal or comes back. Outcomes of slices whose write has failed are counted all the
  // same: the write ends when none is in flight.
  void Landed(const Slice& slice);
  void Return(const Slice& slice);                      // its path failed: another may take it
  void Fail(const Slice& slice, const Status& status);  // the write fails

  void FailAll(const Status& status);  // every write; in-flight slices must be returned or failed as well
  void FailExpired(TimePoint now);
  // Fails the ticket's writes; `done` runs when none of its slices is in flight.
  void Cancel(TicketId ticket, TicketDone done);
  TimePoint NextDeadline() const;
  int32_t num_writes() const { return static_cast<int32_t>(writes_.size()); }

 private:
  struct Key {
    int32_t minus_priority;
    TimePoint deadline;
    uint64_t id;
    auto operator<=>(const Key&) const = default;
  };
  struct Write {
    Key key;
    WriteRequest request;
    std::vector<std::span<const std::byte>> sources;
    WriteDone done;
    size_t intent = 0;        // the next slice begins in this intent,
    uint64_t offset = 0;      // here
    uint64_t bytes_left = 0;  // not yet landed
    int32_t in_flight = 0;
    Status failure;
  };
  void FailWrite(Write& write, const Status& status);
  void EndIfOver(uint64_t id);
  void CheckFences();

  MemoryTable* const memory_;
  const uint32_t slice_bytes_max_;
  uint64_t next_write_ = 1;
  uint64_t next_slice_ = 1;
  absl::flat_hash_map<uint64_t, std::unique_ptr<Write>> writes_;
  std::set<Key> ready_;       // writes with bytes that no path has taken yet
  std::deque<Slice> resend_;  // taken before, came back
  std::vector<std::pair<TicketId, TicketDone>> fences_;
};

}  // namespace millrace::transfer
