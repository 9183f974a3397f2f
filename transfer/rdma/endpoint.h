#pragma once
// One end of a link between two ports: several reliable-connected queue pairs, each with its own completion
// queue, and one completion channel that wakes the transfer thread. Knows verbs, not slices. Transfer thread
// only.
//
// Life: Prepare (RESET -> INIT, receives posted, new packet numbers) -> Connect (RTR -> RTS) -> traffic ->
// Stop (ERR, drained, RESET) -> Prepare ... on the same queue pairs. After an outage both ends must go round:
// packet numbers of the old connection mean nothing to the new one.

#include <deque>
#include <functional>
#include <memory>
#include <vector>

#include "transfer/event_loop.h"
#include "transfer/rdma/device.h"
#include "transfer/rdma/frames.h"

namespace millrace::transfer::rdma {

struct QueuePairName {
  uint32_t number = 0;     // 24 bits
  uint32_t first_psn = 0;  // 24 bits
};

// What one end must know of the other. Plain data; comes from the peer: check before use.
struct End {
  Address address;
  std::vector<QueuePairName> queue_pairs;
};

struct EndpointEvents {
  // A peer's message. Its receive is posted again already.
  std::function<void(uint32_t queue_pair, const Frame&)> frame;
  std::function<void(uint32_t queue_pair, uint32_t immediate)> immediate;  // a WRITE of the peer has landed
  std::function<void(uint32_t queue_pair, uint32_t slot)> data_done;       // own WRITE or READ is complete
  // A completion in error, a queue that does not take work, or something that is no frame. Once per life; the
  // last thing that happens in a round, so that the owner may stop and prepare from here.
  std::function<void(const Status&)> failed;
};

class Endpoint {
 public:
  // `device` and `loop` outlive it. Errors name the device and the call; nothing is left behind after one.
  static StatusOr<std::unique_ptr<Endpoint>> Create(Device* device, EventLoop* loop, uint32_t queue_pairs,
                                                    EndpointEvents events);
  ~Endpoint() { (void)Destroy(); }

  StatusOr<End> Prepare();
  // The peer's numbers are checked: InvalidArgument when they cannot be.
  Status Connect(const End& remote);
  bool connected() const { return connected_; }

  // After Stop returned true nothing is read or written through this end, in either direction, and nothing is
  // reported. Completions that were there before are reported while it runs. False: the device does not obey;
  // then Destroy.
  bool Stop();
  // Gives every object back, for good; afterwards Prepare fails. True: as after Stop. False: the device kept
  // a queue pair (it was lost, say), and memory that the peer could reach must stay reserved until the
  // process ends.
  bool Destroy();

  // ResourceExhausted: no room in the send queue now; try again after a completion. Anything else has broken
  // the link and will be told by `failed`.
  Status SendFrame(uint32_t queue_pair, const Frame& frame);
  struct Data {
    bool read = false;
    std::byte* local = nullptr;
    uint32_t local_key = 0;
    uint32_t length = 0;
    uint64_t remote = 0;
    uint32_t remote_key = 0;
    uint32_t slot = 0;  // reported by data_done; the immediate data of a WRITE
  };
  Status SendData(uint32_t queue_pair, const Data& data);

  // Breaks the link, as a completion in error does: for asynchronous events.
  void Fail(const Status& status);
  bool Owns(const ibv_qp* qp) const;
  bool Owns(const ibv_cq* cq) const;
  uint32_t num_queue_pairs() const { return static_cast<uint32_t>(lanes_.size()); }
  // Polls every completion queue until it is empty. Called on the channel's events; tests may call it.
  void Poll();
  // Whether a WRITE with this immediate data has come in that `immediate` has not been called for yet.
  bool HasImmediate(uint32_t queue_pair, uint32_t immediate);

 private:
  struct Lane {
    ibv_cq* cq = nullptr;
    ibv_qp* qp = nullptr;
    std::deque<ibv_wc> seen;  // taken from the queue, not handled yet; in order
    uint32_t send_queue_used = 0;
    uint32_t first_psn = 0;
  };
  Endpoint(Device* device, EventLoop* loop, EndpointEvents events)
      : device_(device), loop_(loop), events_(std::move(events)) {}
  Status Build(uint32_t queue_pairs);
  Status PostReceive(uint32_t lane, uint32_t index);
  void OnChannel();
  bool Take(Lane& lane);
  void OnCompletion(uint32_t lane, const ibv_wc& completion);
  void TellFailure();
  Status ToInit(Lane& lane);
  Status ToReady(Lane& lane, const QueuePairName& remote, const Address& address);
  Status Posted(int error, Lane& lane, const char* what);

  Device* const device_;
  EventLoop* const loop_;
  EndpointEvents events_;
  ibv_comp_channel* channel_ = nullptr;
  bool watched_ = false;
  std::vector<Lane> lanes_;
  std::vector<FrameBytes> received_;  // [lane][receive]
  ibv_mr* received_mr_ = nullptr;
  uint32_t life_ = 0;  // of the connection: completions of an earlier one are not told
  bool connected_ = false;
  int polling_ = 0;  // depth: callbacks may stop and poll
  bool failed_ = false;
  Status failure_;  // to be told; OK: none
  const std::shared_ptr<Endpoint*> self_ =
      std::make_shared<Endpoint*>(this);  // work posted to the loop may be late
};

}  // namespace millrace::transfer::rdma
