#pragma once
// The active side of transfer-bench: threads that keep transfers in flight against a target, and what they
// measure. Uses transfer/transfer.h only.

#include <atomic>
#include <condition_variable>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include "base/latency_histogram.h"
#include "base/net.h"
#include "server/cli/transfer_bench_control.h"
#include "server/cli/transfer_bench_memory.h"
#include "transfer/transfer.h"

namespace millrace::server {

// One row of the result: what every thread does.
struct BenchLoad {
  enum class Op { kWrite, kRead, kMixed };  // mixed: every second transfer in flight reads
  Op op = Op::kWrite;
  size_t block_bytes = 1 << 20;  // a multiple of 8
  int batch = 1;                 // blocks of one transfer
  int depth = 4;                 // transfers that a thread keeps in flight
  bool check = false;            // every byte of every transfer, against a pattern that changes each round
  bool scatter = false;          // a transfer's blocks go to shuffled places of its area
  bool prepare = false;          // intents are checked once for each area instead of with every transfer
  bool reconnect = false;        // a lost peer is looked for again
  int32_t priority = 0;
  size_t memory_bytes = 64 << 20;  // working set of one thread on each side, at least what is in flight

  size_t transfer_bytes() const { return block_bytes * static_cast<size_t>(batch); }
};

// What all threads of a row share. Times count from `start`.
struct BenchWindow {
  TimePoint start{};  // written before `measuring` is set (release), read after it (acquire)
  Duration bucket{};  // of the timeline; 0: none
  std::vector<std::atomic<uint64_t>> timeline;  // bytes of transfers that ended in each bucket
  std::atomic<bool> measuring{false};
  std::atomic<bool> stopping{false};
  std::atomic<uint64_t> bytes{0};  // of transfers that ended while measuring
};

struct BenchLoss {
  double lost_seconds = 0;  // since the window's start
  double back_seconds = 0;  // 0: not found again
};

struct BenchTally {
  LatencyHistogram latency;  // from submission to the completion callback
  LatencyHistogram submit;   // what the call to submit took
  uint64_t bytes = 0;
  uint64_t transfers = 0;
  uint64_t wrong_bytes = 0;
  uint64_t checked_bytes = 0;
  std::map<std::string, uint64_t> errors;
  std::vector<BenchLoss> losses;

  void Merge(const BenchTally& other);
};

// One thread with its own memory, session, and ticket at the target.
class BenchThread {
 public:
  // All three outlive the thread. `seed` tells initiators' bytes apart.
  BenchThread(transfer::Transfer* transfer, HostPort target, const BenchLoad& load, BenchWindow* window,
              uint64_t seed);
  ~BenchThread();  // waits for the thread, which ends soon after window->stopping

  Status Connect();  // before Start
  void Start();
  BenchTally Finish();  // waits; what it measured

 private:
  struct Slot {
    size_t position = 0;  // area of this slot's transfer in flight
    uint64_t round = 0;
    bool reads = false;
    TimePoint submitted{};
  };
  struct Completion {
    size_t slot = 0;
    Status status;
    TimePoint at;
  };

  void Run();
  void Submit(size_t slot);
  void Complete(size_t slot, Status status);  // transfer thread
  void Account(const Completion& completion);
  void CheckWrite(const Slot& slot);
  void CheckRead(const Slot& slot);
  void CountError(const Status& status);
  void FindAgain();
  void Release();
  uint64_t AreaOffset(const Slot& slot) const { return slot.position * load_.transfer_bytes(); }
  Status Describe(const Slot& slot, transfer::Request* request);
  std::vector<transfer::Intent> Intents(const Slot& slot) const;
  void FillSource(const Slot& slot);
  double SinceStart() const;

  transfer::Transfer* const transfer_;
  const HostPort target_;
  const BenchLoad load_;
  BenchWindow* const window_;
  const uint64_t seed_;
  size_t positions_ = 0;
  std::vector<size_t> places_;  // where block i of a transfer goes, in blocks
  BenchMemory memory_;
  transfer::RegionId region_ = 0;
  std::optional<BenchControl> control_;
  transfer::PeerId peer_ = 0;
  transfer::RegionId remote_region_ = 0;
  transfer::TicketId write_ticket_ = 0;
  transfer::TicketId read_ticket_ = 0;
  std::vector<std::shared_ptr<transfer::IntentList>> prepared_;  // by position; shared with the engine
  std::vector<Slot> slots_;
  int in_flight_ = 0;
  bool lost_ = false;
  uint64_t round_ = 0;
  BenchTally tally_;

  std::mutex mutex_;
  std::condition_variable some_;
  std::vector<Completion> completions_;  // from the transfer thread
  std::thread thread_;
};

}  // namespace millrace::server
