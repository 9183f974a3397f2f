#pragma once
// What one peer is still owed: requests in order of urgency, cut into slices only when a path takes one, and
// every slice that is under way, with its copies. Pure state; transfer thread only.
//
// Urgency is one number, fixed when the request arrives: the time at which it is due. That is its deadline;
// or, without one, when a fair share of an ordinary link would have carried it, so that small requests pass
// large ones that wait. A step of priority moves it kPriorityStep ahead. Later arrivals are due later, so
// nothing waits for ever.

#include <deque>
#include <memory>
#include <set>
#include <vector>

#include "absl/container/btree_map.h"
#include "absl/container/flat_hash_map.h"
#include "transfer/intent_list.h"
#include "transfer/slice.h"

namespace millrace::transfer {

class SliceQueue {
 public:
  // Slices are numbered from `first_slice` on.
  explicit SliceQueue(uint64_t first_slice = 1) : next_slice_(first_slice) {}

  // Takes over a request. Each of these calls may run its `done`, and those of other requests.
  void Add(Operation operation, TicketId ticket, int32_t priority, TimePoint now, TimePoint deadline,
           std::shared_ptr<IntentList> intents, RequestDone done);

  bool HasWork() const { return !again_.empty() || !ready_.empty(); }
  uint64_t bytes_waiting() const { return bytes_waiting_; }
  // The next slice for a path that has room, of at most bytes_max (one that came back keeps its size).
  // HasWork() must be true.
  Slice Take(uint64_t bytes_max);
  // Whether that slice is express. HasWork() must be true.
  bool NextIsExpress() const;
  // Another copy of a slice that is under way; the caller sees to it that a path takes it.
  Slice Copy(uint64_t slice);
  // One copy is terminal. The slice is over when all are and its bytes are known to be right. For a write
  // that is when the last copy to be sent has landed: copies land in their order, so nothing came after it
  // (landing.h). The copies of a read land in any order: every one that was under way together must have
  // landed well.
  void Done(uint64_t slice, uint32_t attempt, SliceOutcome outcome);
  // Whether anybody still waits for the slice's bytes: it has not landed and its request has not failed.
  bool Wanted(uint64_t slice) const;

  void FailAll(const Status& status);  // every request; copies in flight must end as well
  // After FailAll, with every path gone: all copies count as terminal.
  void EndAll();
  void FailExpired(TimePoint now);
  // Fails the ticket's requests; `done` runs when none of its slices is in flight.
  void Cancel(TicketId ticket, TicketDone done);
  TimePoint NextDeadline() const { return deadlines_.empty() ? kNoDeadline : deadlines_.begin()->first; }
  size_t num_requests() const { return requests_.size(); }
  size_t num_slices() const { return slices_.size(); }

 private:
  using Key = std::pair<TimePoint, uint64_t>;  // due, id
  struct Pending {
    Key key;
    Operation operation = Operation::kWrite;
    TicketId ticket = 0;
    TimePoint deadline = kNoDeadline;
    std::shared_ptr<IntentList> intents;  // shared: may be a prepared one
    RequestDone done;
    IntentCursor cursor;
    uint64_t bytes_uncut = 0;
    int32_t slices = 0;  // cut and not over
    Status failure;
  };
  struct Live {
    Slice slice;
    int32_t copies = 0;     // in flight
    bool landed = false;    // the copy that counts, so far
    bool doubtful = false;  // a read: some copy may have left wrong bytes
    bool waiting = false;   // in again_
  };
  void FailRequest(Pending& request, const Status& status);
  void EndSlice(uint64_t id);
  void EndIfOver(uint64_t id);
  void CheckFences();
  uint64_t RetiredBelow() const { return slices_.empty() ? next_slice_ : slices_.begin()->first; }

  uint64_t next_request_ = 1;
  uint64_t next_slice_;
  absl::flat_hash_map<uint64_t, std::unique_ptr<Pending>> requests_;
  std::set<Key> ready_;                             // requests with bytes that no path has taken yet
  std::set<Key> deadlines_;                         // requests that have one
  absl::btree_map<uint64_t, Live> slices_;          // under way, or come back
  std::deque<uint64_t> again_;                      // slices whose every copy ended without landing
  uint64_t bytes_waiting_ = 0;                      // uncut, or in again_
  absl::flat_hash_map<TicketId, int32_t> tickets_;  // requests of each
  std::vector<std::pair<TicketId, TicketDone>> fences_;
};

}  // namespace millrace::transfer
