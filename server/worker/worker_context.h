#pragma once
// What the calls of one worker share, and the thread that owns them.
//
// The control thread owns every call: gRPC's, the engine's and the transfer engine's callbacks only post to
// it. So calls have no locks, and nothing is ever called while one is held. Its tasks are bounded by the
// running calls times what each may have outstanding (tokens, pieces, one read and one write per stream).

#include <atomic>
#include <condition_variable>
#include <map>
#include <memory>
#include <mutex>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "base/random.h"
#include "engine/core/engine.h"
#include "engine/grammar/grammar_mask.h"
#include "server/router/worker_health.h"
#include "server/rpc/task_runner.h"
#include "server/worker/group_report.h"
#include "server/worker/worker.h"
#include "server/worker/worker_metrics.h"
#include "transfer/transfer.h"

namespace millrace::server {

class PrefillDialer;

// Counts objects that use the worker. Thread-safe.
class ActiveCount {
 public:
  void Add(int by);
  bool WaitZero(TimePoint deadline);

 private:
  std::mutex mutex_;
  std::condition_variable zero_;
  int count_ = 0;
};

// Held by each object that outlives its caller's interest; the worker waits for all. The count is shared
// because the last holder may run on a thread of gRPC or of the engine while the worker ends.
class ActiveGuard {
 public:
  explicit ActiveGuard(std::shared_ptr<ActiveCount> count) : count_(std::move(count)) { count_->Add(1); }
  ~ActiveGuard() { count_->Add(-1); }
  ActiveGuard(const ActiveGuard&) = delete;
  ActiveGuard& operator=(const ActiveGuard&) = delete;

 private:
  const std::shared_ptr<ActiveCount> count_;
};

// A call that a client opened. Control thread; watch streams: heartbeat thread.
class WorkerCall {
 public:
  virtual ~WorkerCall() = default;
  virtual void Abort(const Status& status) = 0;  // ends now; nothing when it has ended
};

// How fast this worker is, as it measures itself. Thread-safe.
class WorkerSpeed {
 public:
  struct Report {
    double prefill_tokens_per_second = 0;  // over the time in which prefill was busy; 0 = not yet
    uint64_t prefill_samples = 0;
    double token_gap_seconds = 0;  // between two tokens of an answer; 0 = not yet
    uint64_t token_gap_samples = 0;
  };
  void OnPrefill(int32_t tokens, TimePoint begin, TimePoint end);
  void OnTokenGap(Duration gap);
  Report report() const;

 private:
  mutable std::mutex mutex_;
  double tokens_ = 0;  // both decay, so that recent prompts count most and long ones more than short ones
  double seconds_ = 0;
  TimePoint last_end_;
  Report report_;
};

// Which process a peer of the transfer engine is. Thread-safe.
class PeerEpochs {
 public:
  void Note(transfer::PeerId peer, uint64_t epoch);
  // Of the peers of `paths`; forgets all others.
  std::map<transfer::PeerId, uint64_t> Of(const std::vector<transfer::PathSnapshot>& paths);

 private:
  std::mutex mutex_;
  std::map<transfer::PeerId, uint64_t> epochs_;
};

// What a worker gets from around it: threads, time, and streams to others. All of it outlives its calls.
struct WorkerSeams {
  TaskRunner* control = nullptr;  // owns the calls
  TaskRunner* digest = nullptr;   // reads pages, nothing else; one task per (layer, chunk) or per seal
  // Says how the worker is, whatever the others do: watch streams and the watchdog. One task per stream and
  // look.
  TaskRunner* heartbeat = nullptr;
  PrefillDialer* prefill_workers = nullptr;
  uint64_t seed = RandomId();  // for jitter
};

struct WorkerContext {
  WorkerContext(const WorkerOptions& worker_options, const WorkerSeams& seams, engine::Engine* worker_engine,
                transfer::Transfer* worker_transfer, transfer::RegionId kv_region);
  ~WorkerContext();

  // Control thread.
  engine::RequestId NextId() { return next_id++; }
  // Gives a request that carries a constraint its mask. InvalidArgument says what is wrong with the
  // constraint.
  Status Constrain(engine::SamplingParams* sampling);

  const WorkerOptions options;
  engine::Engine* const engine;        // borrowed
  transfer::Transfer* const transfer;  // borrowed
  const engine::KvLayout layout;
  const uint64_t layout_hash;
  const std::span<std::byte> kv;
  const transfer::RegionId region;                       // of kv
  const std::string descriptor;                          // of transfer
  const std::unique_ptr<engine::GrammarCache> grammars;  // null without a tokenizer
  WorkerMetrics metrics;
  const std::shared_ptr<ActiveCount> active = std::make_shared<ActiveCount>();    // calls, attempts, streams
  const std::shared_ptr<ActiveCount> watchers = std::make_shared<ActiveCount>();  // watch streams

  WorkerSpeed speed;
  PeerEpochs decode_workers;          // that this one has written to
  WorkerHealth prefill_health;        // of the prefill workers that this one asks
  std::atomic<WorkerRole> role;       // changed by the control thread, while nothing runs
  std::atomic<bool> draining{false};  // set once
  std::atomic<bool> stalled{false};   // set by the heartbeat thread
  bool ready() const { return !draining && !stalled; }

  // Control thread.
  std::vector<WorkerCall*> calls;  // in order of arrival
  engine::RequestId next_id = 1;
  // Heartbeat thread.
  std::vector<WorkerCall*> watch_calls;
  const std::unique_ptr<GroupReporter> group;  // null for a worker by itself

  // See WorkerSeams.
  TaskRunner& control;
  TaskRunner& digest;
  TaskRunner& heartbeat;
  PrefillDialer& prefill_workers;
};

// Aborts all of `calls`, which may leave the list meanwhile. On the thread that owns them.
void AbortAll(std::vector<WorkerCall*> calls, const Status& status);

}  // namespace millrace::server
