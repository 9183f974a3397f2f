#pragma once
// The seam between a peer's scheduler and one way to that peer: the sending side of a kind of rail. A path is
// mechanism only. When to connect, what to send, how much at once and when to give up is decided by Peer
// (health.h, peer.h), so that the simulator runs the same policy over modelled paths. Transfer thread only.

#include <string>

#include "transfer/slice.h"

namespace millrace::transfer {

class Path;

// What paths report to. Calls may come from within the path's own methods (a copy that is done at once).
class PathOwner {
 public:
  virtual ~PathOwner() = default;
  virtual void OnConnected(Path* path) = 0;
  // The connection is over, or could not be made. Said first, so that nothing more is sent; the owner answers
  // with Disconnect, and then what was in flight is reported.
  virtual void OnBroken(Path* path, const Status& why) = 0;
  virtual void OnSliceDone(Path* path, uint64_t slice, SliceOutcome outcome) = 0;
  virtual void OnProbeDone(Path* path, uint64_t probe) = 0;
  // The other side says that it is not the process we look for: the peer is gone for good.
  virtual void OnRefused(const Status& why) = 0;
};

// Fixed facts of a path.
struct PathTraits {
  std::string kind;        // tcp, shm, rdma, local
  std::string local_rail;  // for logs, metrics and snapshots
  std::string remote_rail;
  bool carries_slices = true;             // false: a control session, which only answers probes
  uint32_t slices_in_flight_max = 64;     // what the path itself can hold (queue pair depth)
  uint32_t slice_bytes_max = UINT32_MAX;  // larger ones would hold up what shares a thread with them
  // Whether a copy can be overtaken by a later one while the path lives. Where not, the receiver has to break
  // the connection before it lets the later one land: late slices are sent again only when the path is given
  // up.
  bool overtakes = true;
  double cost = 1;                   // topology: predicted times are multiplied by it; 1 = nearest
  double bytes_per_second_hint = 0;  // the link's nominal speed, until measured; 0 = unknown
};

class Path {
 public:
  // Destroying a path ends everything at once, however long that takes; nothing is reported from then on.
  virtual ~Path() = default;
  void Attach(PathOwner* owner) { owner_ = owner; }  // before any other call; outlives the path's activity

  virtual const PathTraits& traits() const = 0;
  // Begins to connect; only when not connected. Ends in OnConnected or OnBroken, or in Disconnect by the
  // owner, who has his own patience.
  virtual void Connect() = 0;
  // Ends the connection, or the attempt. Every slice in flight is reported kUnknown: before this returns
  // where the kind can prove at once that nothing reads or lands any more (a closed socket), else as soon as
  // it can (flushed work requests). No OnBroken. Harmless when not connected.
  virtual void Disconnect() = 0;
  // Connected, and fewer than slices_in_flight_max in flight. Reports OnSliceDone exactly once for it.
  virtual void Send(const Slice& slice) = 0;
  // Connected. A round trip that touches no region; answered with OnProbeDone, or not at all.
  virtual void Probe(uint64_t probe) = 0;

 protected:
  PathOwner* owner_ = nullptr;
};

}  // namespace millrace::transfer
