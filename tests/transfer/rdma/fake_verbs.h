#pragma once
// An RDMA fabric within the process, behind the same table of verbs that the system's libibverbs fills: for
// what no guest and no adapter can be made to do. Every device reaches every other by its GID.
//
// Faithful where it matters: a packet that is in the network lands when it arrives, whatever its sender has
// done since, unless the receiving queue pair was reset meanwhile; objects cannot go before what depends on
// them; completions of an earlier life of a queue pair stay in its queue. Any thread: one mutex.

#include <atomic>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <vector>

#include "transfer/rdma/verbs.h"

namespace millrace::transfer::rdma {

class FakeFabric {
 public:
  // One at a time. Device i is called names[i] and has the GID ::ffff:10.0.<i>.<i + 1>, among others.
  explicit FakeFabric(const std::vector<std::string>& names);
  ~FakeFabric();
  const Verbs* verbs() const { return &verbs_; }
  Verbs* mutable_verbs() { return &verbs_; }  // before it is used: to take functions away

  // Objects that were made and not given back.
  int live() const;
  std::string live_text() const;

  // The n-th call from now of `function` ("create_qp") fails with `error`, and so do all after it until Heal.
  void FailCall(const std::string& function, int n, int error);
  void Heal();

  enum class Wire {
    kGood,
    kHold,   // nothing arrives, nothing completes, until it is good again: then everything arrives, in order
    kBlack,  // nothing arrives, ever
  };
  void SetWire(const std::string& device, Wire wire);  // of what the device sends
  // Sends of the device succeed, but their completions come only when it is set back.
  void HoldCompletions(const std::string& device, bool hold);
  // The next data operation (WRITE or READ) of the device ends with this status.
  void FailNextData(const std::string& device, ibv_wc_status status);
  void SetPort(const std::string& device, bool up);  // with events, on both ends' devices if `up` changes
  void SendEvent(const std::string& device, ibv_event_type type);  // for a QP or CQ event: the first of them
  void OverrunCq(const std::string& device);
  uint64_t bytes_written(const std::string& device) const;  // by WRITEs of the device that landed
  int queue_pairs(const std::string& device) const;

  struct Device;
  struct Context;
  struct Pd;
  struct Mr;
  struct Channel;
  struct Cq;
  struct Qp;
  struct Packet;

 private:
  friend struct FakeCalls;
  bool Fails(const char* function);
  Device* Find(const std::string& name) const;
  Qp* FindQp(uint32_t number) const;
  void Execute(Packet packet);
  void Deliver(Packet& packet);
  void Complete(Qp* qp, const Packet& packet, ibv_wc_status status);
  void Push(Cq* cq, const ibv_wc& completion);
  void Break(Qp* qp);
  void Raise(Device* device, ibv_async_event event);

  mutable std::mutex mutex_;
  Verbs verbs_;
  std::vector<std::unique_ptr<Device>> devices_;
  std::map<const void*, std::function<void()>> objects_;  // and how to free what a test leaves behind
  std::map<std::string, int> made_;
  std::map<uint32_t, Qp*> qps_;
  std::map<uint32_t, Mr*> mrs_;
  uint32_t next_number_ = 100;
  struct Fault {
    int calls_left = 0;
    int error = 0;
  };
  std::map<std::string, Fault> faults_;
  std::deque<Packet> network_;  // held
};

}  // namespace millrace::transfer::rdma
