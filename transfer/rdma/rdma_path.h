#pragma once
// The initiating end of a link: asks the target for leave to touch memory, slice by slice, then WRITEs or
// READs past its processor. Transfer thread only.
//
// Why leave is asked for: the target's adapter lets any holder of a region's key write, so the receiver's
// checks (ticket, epoch, range, no later copy) must come before the key. It costs one round trip per slice,
// which slices in flight hide. Keys per ticket (memory windows) would save it, but a window covers one
// contiguous range, a ticket hundreds, and taking one back is a work request that a broken link cannot carry.

#include <deque>
#include <memory>
#include <string>
#include <vector>

#include "proto/rdma.pb.h"
#include "transfer/path.h"
#include "transfer/rail.h"
#include "transfer/rdma/endpoint.h"
#include "transfer/rdma/regions.h"

namespace millrace::transfer::rdma {

// To and from the wire. InvalidArgument for a peer's End that cannot be.
void FillEnd(const End& end, v1::End* message);
StatusOr<End> ParseEnd(const v1::End& message);

inline constexpr uint32_t kQueuePairs =
    2;  // per link; more help adapters that process one queue pair serially

class RdmaPath : public Path {
 public:
  struct Target {
    uint64_t link = 0;  // this process's name for it; unique
    std::string rail;   // the peer's
    std::string text;   // for logs
  };
  // All outlive the path. `forget` runs when it is destroyed. `control` may be null: it never connects then.
  RdmaPath(EventLoop* loop, Device* device, size_t device_index, const Regions* regions,
           ControlChannel* control, Target target, std::function<void()> forget);
  ~RdmaPath() override;

  const PathTraits& traits() const override { return traits_; }
  void Connect() override;
  void Disconnect() override;
  void Send(const Slice& slice) override;
  void Probe(uint64_t probe) override;

  uint64_t link() const { return target_.link; }
  const ControlChannel* control() const { return control_; }
  const Device* device() const { return device_; }
  Endpoint* endpoint() const { return endpoint_.get(); }  // may be null
  void OnAccept(const v1::Accept& accept);
  void OnPeerBroke(const v1::Broken& broken);
  // The link is over, for a reason on this side.
  void Break(const Status& why);
  // Posts what the send queue had no room for. False: some is left, come again soon.
  bool PostDeferred();

 private:
  enum class State { kIdle, kAsked, kUp };
  enum class Step { kFree, kAsked, kMoving };
  struct Slot {
    Step step = Step::kFree;
    Slice slice;
  };
  // What the send queue had no room for.
  struct Deferred {
    uint32_t queue_pair = 0;
    bool data = false;
    Frame frame;
    Endpoint::Data move;
  };
  void OnFrame(uint32_t queue_pair, const Frame& frame);
  void OnAnswer(uint32_t queue_pair, const Frame& frame);
  void OnDataDone(uint32_t queue_pair, uint32_t slot);
  void Finish(uint32_t queue_pair, uint32_t slot, SliceOutcome outcome);
  void Post(const Deferred& work);
  void TellPeer(const std::string& reason);
  // Puts this end to rest; every slice is reported kUnknown, unless the device does not let go of its memory.
  void Rest();

  EventLoop* const loop_;
  Device* const device_;
  const size_t device_index_;
  const Regions* const regions_;
  ControlChannel* const control_;
  const Target target_;
  const std::function<void()> forget_;
  PathTraits traits_;
  State state_ = State::kIdle;
  uint32_t generation_ = 0;
  bool peer_knows_ = true;  // that this generation is over
  std::unique_ptr<Endpoint> endpoint_;
  std::vector<std::vector<Slot>> slots_;     // [queue pair][slot]
  std::vector<std::vector<uint32_t>> free_;  // [queue pair], slots
  uint32_t next_queue_pair_ = 0;
  std::deque<Deferred> deferred_;
  uint64_t probe_ = 0;
  uint32_t probe_answers_ = 0;
};

}  // namespace millrace::transfer::rdma
