#pragma once
// How a kind of rail plugs in: one object per kind and process, made by MakeRailKinds. It owns the rails of
// its kind (addresses, devices), the receiving side of each, and makes the paths of the sending side.
//
// Transfer thread only, except where a method says otherwise.

#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "base/random.h"
#include "transfer/event_loop.h"
#include "transfer/landing.h"
#include "transfer/memory_table.h"
#include "transfer/path.h"

namespace millrace::transfer {

// One side of the control session between two processes: ordered messages between the RailKinds of the same
// name on both sides. What is sent while the session is down, or lost with it, is gone; kinds that need an
// answer ask again. The initiating side lives as long as its peer; the accepting side until OnControlClosed.
class ControlChannel {
 public:
  virtual ~ControlChannel() = default;
  // At most kControlBytesMax. False: not connected, nothing was sent.
  virtual bool SendMessage(const std::string& kind, const std::string& body) = 0;
  virtual uint64_t peer_epoch() const = 0;
};
inline constexpr uint32_t kControlBytesMax = 64 << 10;

// What every kind is given. All of it outlives the kind.
struct RailEnvironment {
  EventLoop* loop = nullptr;
  const Clock* clock = nullptr;
  MemoryTable* memory = nullptr;    // tickets: Admit / Unpin, PinTicket / Unpin
  LandingTable* landing = nullptr;  // copies of the same slice, across connections and kinds
  const Options* options = nullptr;
  uint64_t epoch = 0;  // this process's
  // For kinds that carry the control session (tcp): hands on what arrived, and that a channel is gone.
  std::function<void(ControlChannel* channel, const std::string& kind, const std::string& body)> on_control;
  std::function<void(ControlChannel* channel)> on_control_closed;
};

struct RailAddress {
  std::string kind;
  std::string address;  // the kind's own text; parsed as a stranger's
};

// A remote process as its descriptor names it.
struct RemotePeer {
  uint64_t epoch = 0;
  std::string name;
  std::vector<RailAddress> rails;
};

struct ReceiverCounters {
  uint64_t bytes_received = 0;
  uint64_t slices_refused = 0;  // by ticket, epoch or range, or with a wrong checksum
};

class RailKind {
 public:
  virtual ~RailKind() = default;
  virtual const char* name() const = 0;

  // Finds and opens the rails of this process. Before the loop runs. An error ends Transfer::Create: it is
  // for what the caller asked for by name and cannot have; a kind that does not work here has no addresses.
  virtual Status Start() = 0;
  // After Start; any thread, fixed.
  virtual std::vector<RailAddress> Addresses() const = 0;

  // Memory comes and goes. Called on the thread that registers, before the region's id is known to anybody; a
  // kind that needs keys guards them itself. Deregister is called when no ticket or request names the region.
  virtual Status RegisterRegion(RegionId region, std::span<std::byte> memory, bool writable) {
    (void)region, (void)memory, (void)writable;
    return OkStatus();
  }
  virtual void DeregisterRegion(RegionId region) { (void)region; }

  // The control session to the peer, from a kind that can carry one: a path without slices, and its channel,
  // which lives as long as the path.
  struct Control {
    std::unique_ptr<Path> path;
    ControlChannel* channel = nullptr;
  };
  virtual Control MakeControl(const RemotePeer& peer) {
    (void)peer;
    return {};
  }
  // The paths from this process's rails to the peer's, of this kind; none when the two cannot meet. `control`
  // is null when there is no control session. InvalidArgument for an address that cannot be.
  virtual StatusOr<std::vector<std::unique_ptr<Path>>> MakePaths(const RemotePeer& peer,
                                                                 ControlChannel* control) = 0;

  // A message from the RailKind of the same name on the other side. Its content is a stranger's.
  virtual void OnControl(ControlChannel* channel, const std::string& body) { (void)channel, (void)body; }
  virtual void OnControlClosed(ControlChannel* channel) { (void)channel; }

  // The ticket has been closed and is pinned still. A kind whose slices land without its doing (one-sided
  // writes) must now bring about that none can, and then drop its pins.
  virtual void OnTicketClosing(TicketId ticket) { (void)ticket; }

  // Regular work; says when it wants to run again at the latest.
  virtual TimePoint Tick(TimePoint now) {
    (void)now;
    return kNoDeadline;
  }
  // Receiving ends: nothing lands and no pin is left when this returns.
  virtual void CloseAll() = 0;
  virtual ReceiverCounters counters() const { return {}; }
};

// Every kind that options.kinds asks for, in the order of preference. The one list of kinds: rails.cc.
std::vector<std::unique_ptr<RailKind>> MakeRailKinds(const RailEnvironment& environment);

}  // namespace millrace::transfer
