#pragma once
// Modelled rails and receivers under the production scheduler, health and ticket code. A rail is a queue with
// a rate and a delay that can be cut, swallow everything, slow down or damage bytes; a connection over it
// behaves like TCP: nothing is lost while it lives, but what a black hole held back comes late, and what a
// connection that its sender gave up had on the way may still arrive.
//
// Memory is never touched: each block of kBlock bytes has a stamp that says which request's bytes lie there.

#include <fmt/core.h>

#include <functional>
#include <map>
#include <memory>
#include <set>
#include <string>
#include <vector>

#include "base/random.h"
#include "tests/sim/world.h"
#include "transfer/landing.h"
#include "transfer/memory_table.h"
#include "transfer/path.h"

namespace millrace::sim {

inline constexpr uint64_t kBlock = 64 << 10;

// Bugs that are planted to see that the checkers find them. Each is a mistake that others made.
enum class Bug {
  kNone,
  kFlushIsSuccess,   // a slice whose connection was torn down counts as landed
  kSkipDrain,        // the ticket's pin is given back before the last byte lands
  kLeftoversLand,    // a late copy from a dead connection lands after a newer one
  kReusedEpoch,      // a restarted receiver has its old epoch and old ticket numbers
  kForgottenSlice,   // a teardown does not report one of its slices
  kReadAfterDone,    // the sender's buffers are read after the request has ended
  kChecksumIgnored,  // damaged bytes are answered as landed
  kTimerDrains,      // a closing ticket is given up by the clock, not by proof
  kReadUnpinned,     // a read's pin is given back when it is answered, not when its bytes have left memory
  kNumbersAnew,      // a peer that is opened again after it was lost numbers its slices from 1
};
const char* Name(Bug bug);
inline constexpr Bug kBugs[] = {Bug::kFlushIsSuccess,  Bug::kSkipDrain,      Bug::kLeftoversLand,
                                Bug::kReusedEpoch,     Bug::kForgottenSlice, Bug::kReadAfterDone,
                                Bug::kChecksumIgnored, Bug::kTimerDrains,    Bug::kReadUnpinned,
                                Bug::kNumbersAnew};

// What the checkers know. The first violation is kept.
struct Checks {
  std::string violation;
  void Fail(const World& world, const std::string& what) {
    if (violation.empty())
      violation = fmt::format("at {:.6f} s: {}", Seconds(world.Now().time_since_epoch()), what);
  }
};

struct Rail {
  double bytes_per_second = 1e9;
  Duration delay = std::chrono::microseconds(50);
  bool cut = false;         // connections break at once, new ones are refused
  bool severed = false;     // with cut and black_hole: the receiver does not learn of it for long
  bool black_hole = false;  // nothing arrives, nobody is told
  double factor = 1;        // of the rate
  double damage = 0;        // probability that a slice's bytes are wrong
  TimePoint busy_until{};
  TimePoint back_busy_until{};        // the other direction: what is read
  std::vector<class SimPath*> paths;  // oldest first: a set of pointers has another order in each run
  uint64_t bytes_carried = 0;
};

// One process that owns memory: tickets, the landing table, and connections to it.
class Receiver {
 public:
  Receiver(World* world, Checks* checks, Bug bug, uint64_t epoch, uint64_t blocks);

  World* const world;
  Checks* const checks;
  const Bug bug;
  const uint64_t epoch;
  transfer::MemoryTable memory;
  transfer::LandingTable landing;
  transfer::RegionId region = 0;
  std::vector<uint64_t> stamps;            // of each block; 0 = as it was
  std::vector<bool> guarded;               // blocks whose ticket has drained: nothing may land there
  uint64_t bytes_landed = 0;               // of slices that were answered as such
  std::vector<class SimConnection*> open;  // connections to it, oldest first
  bool dead = false;
  Receiver* successor = nullptr;  // the restarted process

  size_t BlockOf(const std::byte* at) const { return static_cast<size_t>(at - memory_base) / kBlock; }
  void Die();  // the process ends: every connection is gone
  // Connections that are stuck in a slice of a closing ticket are closed after a while, as TcpReceiver does.
  void Watch();
  std::byte* memory_base = nullptr;
};

// What the initiating side knows of its memory: which request's bytes, and whether it has ended.
struct Sources {
  std::map<uint64_t, uint64_t> stamp_of_block;  // what writes send, and reads bring
  std::set<uint64_t> busy;                      // blocks of requests that have not ended
  std::byte* base = nullptr;
};

class SimPath : public transfer::Path {
 public:
  SimPath(World* world, Rail* rail, Receiver* receiver, Sources* sources, uint64_t own_epoch, Random* random,
          std::string name, bool control);
  ~SimPath() override;
  const transfer::PathTraits& traits() const override { return traits_; }
  void Connect() override;
  void Disconnect() override;
  void Send(const transfer::Slice& slice) override;
  void Probe(uint64_t probe) override;
  void Cut();  // the rail was: the connection breaks

 private:
  friend class SimConnection;
  void SendRead(const transfer::Slice& slice);
  World* const world_;
  Rail* const rail_;
  Receiver* receiver_;
  Sources* const sources_;
  const uint64_t own_epoch_;
  Random* const random_;
  transfer::PathTraits traits_;
  std::shared_ptr<class SimConnection> connection_;
  bool connected_ = false;
  uint64_t generation_ = 0;
  std::map<uint64_t, transfer::Slice> in_flight_;
};

}  // namespace millrace::sim
