#pragma once
// Moves bytes between registered regions of two processes over every rail that joins them. Never hears of
// tokens.
//
// Vocabulary: rail = one way out of this process (a NIC address for TCP, an RDMA port, shared memory, `local`
// within the process). Path = a local rail joined to a remote rail. Region = registered memory. Intent =
// bytes of one of my regions to (write) or from (read) bytes of a peer's region, under a ticket. Slice = what
// one path carries of an intent at a time. Peer = one remote process, with an epoch that changes when it
// restarts. Ticket = the owner's permission to write to, or read from, certain ranges of its memory.
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
using TicketId = uint64_t;  // chosen by the owner of the memory, unique within its epoch; 0 is none

enum class Operation : uint8_t { kWrite, kRead };
inline constexpr const char* Name(Operation operation) {
  return operation == Operation::kWrite ? "write" : "read";
}

struct Range {
  RegionId region = 0;
  uint64_t offset = 0;
  uint64_t bytes = 0;
};

// `count` pieces of local.bytes each: piece i lies at local.offset + i * local_stride here and at
// remote_offset + i * remote_stride there.
struct Intent {
  Range local;  // in a region of this process: the source of a write, the destination of a read
  RegionId remote_region = 0;  // the peer's name for its region
  uint64_t remote_offset = 0;
  uint32_t count = 1;
  uint64_t local_stride = 0;
  uint64_t remote_stride = 0;
};

// Intents that were checked once and may be submitted often; see Transfer::Prepare. Holds its regions
// registered while it lives.
class IntentList;

struct Request {
  Operation operation = Operation::kWrite;
  TicketId ticket = 0;                   // the memory's owner gave it
  std::vector<Intent> intents;           // not empty, unless `prepared` is set;
  std::shared_ptr<IntentList> prepared;  // shared: the caller keeps it for the next request
  TimePoint deadline = kNoDeadline;
  // Each step is a head start of kPriorityStep over what waits for the same peer; no request waits for ever
  // behind later ones of a higher priority.
  int32_t priority = 0;
};
inline constexpr Duration kPriorityStep = std::chrono::milliseconds(250);
inline constexpr int32_t kPriorityMax = 40;  // and -kPriorityMax; more is cut

// Runs once, on the transfer thread; must not block. OK means: every byte is in its place and the peer said
// so. Anything else means that some bytes may or may not have landed.
using RequestDone = absl::AnyInvocable<void(Status) &&>;
using TicketDone = absl::AnyInvocable<void() &&>;

struct Options {
  // Rails to be reached by: "10.0.0.1:0" (a TCP address; port 0 = any), "auto" or "auto:PORT" (every address
  // of every usable NIC, IPv4 and IPv6). Empty: this process can only be reached through `local`.
  std::vector<std::string> listen;
  // For what is discovered: shell patterns on interface, device or address. Excluded wins; an empty include
  // list is everything. Loopback, docker and virtual bridges are left out unless included by name.
  std::vector<std::string> include;
  std::vector<std::string> exclude;
  // Kinds of rail to use: tcp, shm, rdma, local. Empty: all that work here.
  std::vector<std::string> kinds;
  std::string name = "transfer";  // for logs and metrics
  // A slice is what a path carries in about slice_time, within these bounds.
  uint32_t slice_bytes_min = 64 << 10;
  uint32_t slice_bytes_max = 1 << 20;
  Duration slice_time = std::chrono::microseconds(250);
  uint32_t connections_per_path = 1;
  uint64_t queued_bytes_max = uint64_t{1} << 36;  // per peer; more is ResourceExhausted
  uint64_t queued_requests_max = 1 << 16;         // per peer; more is ResourceExhausted
  Duration heartbeat = std::chrono::milliseconds(500);
  Duration peer_timeout = std::chrono::seconds(3);  // no sign of life on any path or the control session
  Duration slice_timeout =
      std::chrono::seconds(2);  // a path that is silent for so long with slices in flight
                                // is given up even if no other path speaks for the peer
  // No slice counts as late before, however fast its path; patience with silence and probes are multiples of
  // it. Less finds outages sooner; more is calmer where a process may have to wait for a processor.
  Duration late_min = std::chrono::milliseconds(8);
  // A path that was once at least twice as fast and was given nothing for so long takes a slice, to be
  // measured anew.
  Duration trial_period = std::chrono::seconds(1);
  Metrics* metrics = nullptr;  // may be null; outlives the engine
};

struct PathSnapshot {
  PeerId peer = 0;
  std::string kind;  // tcp, shm, rdma, local; control for the session that carries only heartbeats
  std::string local_rail;
  std::string remote_rail;
  std::string state;   // down, connecting, probation, up, suspect
  std::string reason;  // why it last left `up`
  uint64_t bytes_done = 0;
  uint64_t slices_done = 0;
  uint64_t slices_resent = 0;  // came back from this path and were given to any
  uint64_t slices_hedged = 0;  // were late here and sent again elsewhere
  uint64_t bytes_hedged = 0;
  uint64_t trips = 0;  // outages
  uint64_t bytes_in_flight = 0;
  uint64_t window_bytes = 0;    // in-flight target
  double bytes_per_second = 0;  // measured over busy time; 0 = not yet
  double delay_seconds = 0;     // smoothed time from send to answer of unqueued slices; 0 = not yet
};

struct Snapshot {
  std::vector<PathSnapshot> paths;
  int32_t peers = 0;
  int32_t open_tickets = 0;      // this process's memory: open or draining
  int32_t draining_tickets = 0;  // closed, but a slice may still touch their memory: in quarantine
  int32_t pending_requests = 0;  // sender side
  uint64_t bytes_received = 0;
  uint64_t slices_refused = 0;     // arrived without a valid ticket, epoch, range or checksum
  uint64_t slices_superseded = 0;  // copies that arrived after a later one of the same slice
};

// All methods: any thread. One transfer thread owns peers, paths, tickets and queues; it does not depend on
// any caller's progress.
class Transfer {
 public:
  static StatusOr<std::unique_ptr<Transfer>> Create(const Options& options);
  // Closes every connection, fails pending requests with kCancelled, resolves every ticket; after it returns
  // nothing touches any region.
  virtual ~Transfer() = default;

  // Makes memory known. The caller keeps it alive until Deregister returned or the Transfer is gone.
  // `writable` says whether it may be written to by peers (under a ticket) and by reads of this process.
  // Kinds of rail that need to know memory beforehand (RDMA) register it here: may take long, and a failure
  // of one kind is logged and costs that kind only.
  virtual StatusOr<RegionId> Register(std::span<std::byte> memory, bool writable) = 0;
  // FailedPrecondition while a ticket, a prepared list or a pending request names the region.
  virtual Status Deregister(RegionId region) = 0;

  // How peers reach this process: a serialised transfer.proto PeerDescriptor (epoch, rails, protocol
  // version). Opaque to callers; pass it to the other side's Open.
  virtual std::string Descriptor() const = 0;
  virtual uint64_t epoch() const = 0;

  // Starts connecting to the process that `descriptor` names, or gives the existing peer when it is known
  // already (same epoch). InvalidArgument for a malformed or incompatible descriptor. Connecting goes on in
  // the background; requests wait for it until their deadline or the peer is lost.
  virtual StatusOr<PeerId> Open(const std::string& descriptor) = 0;

  // Checks intents once, for Request::prepared. InvalidArgument for ranges outside regions.
  virtual StatusOr<std::shared_ptr<IntentList>> Prepare(std::vector<Intent> intents) = 0;

  // Queues a request. ResourceExhausted when the peer's queue is full, NotFound for an unknown peer,
  // InvalidArgument for ranges outside regions; `done` is then destroyed uncalled. Fails with Unavailable
  // when the peer is lost, DeadlineExceeded past the deadline, PermissionDenied when the owner refused a
  // slice (closed or unknown ticket, range not granted), Cancelled after Cancel, DataLoss never: a bad
  // checksum is sent again.
  virtual Status Submit(PeerId peer, Request request, RequestDone done) = 0;
  // Submitter's fence: no further slice of this ticket is begun; `done` runs when every one in flight is
  // terminal (answered, or its connection torn down). Pending requests of the ticket end with kCancelled
  // before.
  virtual void Cancel(PeerId peer, TicketId ticket, TicketDone done) = 0;

  // Owner: lets the process with `peer_epoch` write to (or read from) `ranges` of this process's regions. A
  // new ticket's id is returned; ExtendTicket adds ranges (a further grant) of the same operation.
  virtual StatusOr<TicketId> OpenTicket(uint64_t peer_epoch, std::vector<Range> ranges,
                                        Operation operation = Operation::kWrite) = 0;
  virtual Status ExtendTicket(TicketId ticket, std::vector<Range> ranges) = 0;
  // Owner's fence: from now on no slice of this ticket is admitted; `done` runs when none that was
  // admitted can still touch memory. Runs exactly once, also for an unknown ticket (at once). No timer ever
  // makes it run. Bounds per kind of rail: README.
  virtual void CloseTicket(TicketId ticket, TicketDone done) = 0;

  virtual Snapshot TakeSnapshot() const = 0;
};

// Digest of one piece that does not depend on where it lies: sums of pieces can be compared across processes
// in any order. `piece` names the piece within the ticket.
uint64_t PieceDigest(std::span<const std::byte> bytes, uint64_t piece);

}  // namespace millrace::transfer
