#pragma once
// The target's end of a link: checks what the initiator asks for, lends it address and key, and takes them
// back when the data is through, or by putting its own queue pairs to rest. Transfer thread only.
//
// The fence is local: a queue pair in RESET drops whatever still arrives, so pins are given back as soon as
// Rest has returned, without a word from the initiator.

#include <memory>
#include <string>
#include <vector>

#include "proto/rdma.pb.h"
#include "transfer/rail.h"
#include "transfer/rdma/endpoint.h"
#include "transfer/rdma/regions.h"

namespace millrace::transfer::rdma {

class RdmaTarget {
 public:
  struct Environment {
    EventLoop* loop = nullptr;
    const Clock* clock = nullptr;
    MemoryTable* memory = nullptr;
    LandingTable* landing = nullptr;
    const Regions* regions = nullptr;
    ReceiverCounters* counters = nullptr;
  };
  // `device` and everything in the environment outlive it.
  RdmaTarget(const Environment& environment, Device* device, size_t device_index, uint64_t peer_epoch,
             uint64_t link);
  ~RdmaTarget();

  // Ends what was, and makes the asked generation. `channel` is kept for news until ForgetChannel.
  void OnConnect(const v1::Connect& connect, ControlChannel* channel);
  void OnPeerBroke(const v1::Broken& broken);
  void ForgetChannel(const ControlChannel* channel);
  // The link is over, for a reason on this side; the initiator is told.
  void Break(const Status& why);
  void OnTicketClosing(TicketId ticket, TimePoint now);

  // Ends leases of closed tickets that are not given back within kClosingStall. When to come again.
  TimePoint Tick(TimePoint now);
  // No session and no sign of life for `patience`: the initiator is gone.
  bool Abandoned(TimePoint now, Duration patience) const;

  uint64_t peer_epoch() const { return peer_epoch_; }
  uint64_t link() const { return link_; }
  const Device* device() const { return device_; }
  Endpoint* endpoint() const { return endpoint_.get(); }  // may be null
  int32_t num_leases() const { return num_leases_; }

 private:
  // What the initiator may touch right now under one slot.
  struct Lease : public Lander {
    RdmaTarget* target = nullptr;
    bool active = false;
    bool superseded = false;  // after it had landed; only the news of that is on its way
    bool read = false;
    uint32_t queue_pair = 0;
    uint32_t slot = 0;
    TicketId ticket = 0;
    uint64_t slice = 0;
    uint32_t length = 0;
    void Supersede() override { target->Supersede(this); }
  };
  struct Answer {
    uint32_t queue_pair = 0;
    Frame frame;
  };
  void OnFrame(uint32_t queue_pair, const Frame& frame);
  void OnRequest(uint32_t queue_pair, const Frame& frame);
  void OnEnd(uint32_t queue_pair, uint32_t slot, bool by_write);
  void Supersede(Lease* lease);
  void SendAnswer(uint32_t queue_pair, const Frame& frame);
  void Rest();
  void GiveBack(Lease* lease);
  void Refuse(const v1::Connect& connect, ControlChannel* channel, const std::string& why);

  const Environment env_;
  Device* const device_;
  const size_t device_index_;
  const uint64_t peer_epoch_;
  const uint64_t link_;
  ControlChannel* channel_ = nullptr;
  std::unique_ptr<Endpoint> endpoint_;
  uint32_t generation_ = 0;
  bool up_ = false;
  std::vector<std::vector<Lease>> leases_;  // [queue pair][slot]
  int32_t num_leases_ = 0;
  std::vector<Answer> unsent_;
  TimePoint last_heard_;
  TimePoint closing_since_ = kNoDeadline;  // a ticket with a lease here began to close
};

}  // namespace millrace::transfer::rdma
