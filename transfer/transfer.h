#pragma once
// Moves bytes between registered regions of two processes over every rail that joins them. Never hears of
// tokens.
//
// Vocabulary: rail = one way out of this process (a NIC address for TCP, `local` within the process). Path =
// a local rail joined to a remote rail. Region = registered memory. Intent = bytes of one of my regions to
// bytes of a peer's region, under a ticket. Slice = what one path carries of an intent at a time. Peer = one
// remote process, with an epoch that changes when it restarts. Ticket = the receiver's permission to write to
// certain ranges.
//
// Callers state intents and never name a rail: slices wait in one queue per peer and a path takes the next
// one when it has room.

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "absl/functional/any_invocable.h"
#include "base/clock.h"
#include "base/metrics.h"
#include "base/status.h"

namespace millrace::transfer {

using RegionId = uint32_t;  // this process's name for a region; never reused
using PeerId = uint32_t;    // this process's name for a peer; never reused
using TicketId = uint64_t;  // chosen by the receiver, unique within its epoch; 0 is none

struct Range {
  RegionId region = 0;
  uint64_t offset = 0;
  uint64_t bytes = 0;
};

struct Intent {
  Range source;                // in a region of this process
  RegionId remote_region = 0;  // the peer's name for its region
  uint64_t remote_offset = 0;  // source.bytes are written there
};

struct WriteRequest {
  TicketId ticket = 0;          // the receiver's
  std::vector<Intent> intents;  // not empty
  TimePoint deadline = kNoDeadline;
  int32_t priority = 0;  // higher first among what waits for the same peer
};

// Runs once, on the transfer thread; must not block. OK means: every byte is in the peer's memory and the
// peer said so. Anything else means that some bytes may or may not have landed.
using WriteDone = absl::AnyInvocable<void(Status) &&>;
using TicketDone = absl::AnyInvocable<void() &&>;

struct Options {
  // Addresses to listen on, one TCP rail each ("10.0.0.1:0" = any port). Empty: this process can only be
  // reached through `local` (same process).
  std::vector<std::string> listen;
  std::string name = "transfer";  // for logs and metrics
  uint32_t slice_bytes_max = 256 << 10;
  uint32_t path_bytes_in_flight_max = 1 << 20;  // per path, until measured better
  uint32_t connections_per_path = 1;
  uint64_t queued_bytes_max = uint64_t{1} << 32;  // per peer; more is ResourceExhausted
  Duration heartbeat = std::chrono::milliseconds(500);
  Duration peer_timeout = std::chrono::seconds(3);   // no sign of life on any path or the control session
  Duration slice_timeout = std::chrono::seconds(2);  // an unanswered slice is sent again on another path
  Metrics* metrics = nullptr;                        // may be null; outlives the engine
};

struct PathSnapshot {
  PeerId peer = 0;
  std::string local_rail;
  std::string remote_rail;
  std::string state;  // connecting, up, suspect, down, probation
  uint64_t bytes_done = 0;
  uint64_t slices_done = 0;
  uint64_t slices_resent = 0;
  uint64_t bytes_in_flight = 0;
  double bytes_per_second = 0;  // measured over busy time; 0 = not yet
  double delay_seconds = 0;     // smoothed time from send to acknowledgement of unqueued slices; 0 = not yet
};

struct Snapshot {
  std::vector<PathSnapshot> paths;
  int32_t peers = 0;
  int32_t open_tickets = 0;    // receiver side: open or draining
  int32_t pending_writes = 0;  // sender side
  uint64_t bytes_received = 0;
  uint64_t slices_refused = 0;  // arrived without a valid ticket, epoch, range or checksum
};

// All methods: any thread. One transfer thread owns peers, paths, tickets and queues; it does not depend on
// any caller's progress.
class Transfer {
 public:
  static StatusOr<std::unique_ptr<Transfer>> Create(const Options& options);
  // Closes every connection, fails pending writes with kCancelled, resolves every ticket; after it returns
  // nothing touches any region.
  virtual ~Transfer() = default;

  // Makes memory known. The caller keeps it alive until Deregister returned or the Transfer is gone.
  // `writable` says whether peers may write to it (under a ticket).
  virtual StatusOr<RegionId> Register(std::span<std::byte> memory, bool writable) = 0;
  // FailedPrecondition while a ticket or a pending write names the region.
  virtual Status Deregister(RegionId region) = 0;

  // How peers reach this process: a serialised transfer.proto PeerDescriptor (epoch, rails, protocol
  // version). Opaque to callers; pass it to the other side's Open.
  virtual std::string Descriptor() const = 0;
  virtual uint64_t epoch() const = 0;

  // Starts connecting to the process that `descriptor` names, or gives the existing peer when it is known
  // already (same epoch). InvalidArgument for a malformed or incompatible descriptor. Connecting goes on in
  // the background; writes wait for it until their deadline or the peer is lost.
  virtual StatusOr<PeerId> Open(const std::string& descriptor) = 0;

  // Queues a write. ResourceExhausted when the peer's queue is full, NotFound for an unknown peer,
  // InvalidArgument for ranges outside regions; `done` is then destroyed uncalled. Fails with Unavailable
  // when the peer is lost, DeadlineExceeded past the deadline, PermissionDenied when the receiver refused a
  // slice (closed or unknown ticket, range not granted), Cancelled after CancelWrites, DataLoss never: a bad
  // checksum is sent again.
  virtual Status Write(PeerId peer, WriteRequest request, WriteDone done) = 0;
  // Sender's fence: no further slice of this ticket is begun; `done` runs when every one in flight is
  // terminal (answered, or its connection torn down). Pending writes of the ticket end with kCancelled
  // before.
  virtual void CancelWrites(PeerId peer, TicketId ticket, TicketDone done) = 0;

  // Receiver: lets the process with `peer_epoch` write to `ranges` of this process's regions. A new ticket's
  // id is returned; ExtendTicket adds ranges (a further grant).
  virtual StatusOr<TicketId> OpenTicket(uint64_t peer_epoch, std::vector<Range> ranges) = 0;
  virtual Status ExtendTicket(TicketId ticket, std::vector<Range> ranges) = 0;
  // Receiver's fence: from now on no slice of this ticket is admitted; `done` runs when none that was
  // admitted can still touch memory. Runs exactly once, also for an unknown ticket (at once). No timer ever
  // makes it run.
  virtual void CloseTicket(TicketId ticket, TicketDone done) = 0;

  virtual Snapshot TakeSnapshot() const = 0;
};

// Digest of one piece that does not depend on where it lies: sums of pieces can be compared across processes
// in any order. `piece` names the piece within the ticket.
uint64_t PieceDigest(std::span<const std::byte> bytes, uint64_t piece);

}  // namespace millrace::transfer
