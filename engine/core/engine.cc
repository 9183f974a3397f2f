// The engine's thread: drains commands, steps the core, publishes what others may see.

#include "engine/core/engine.h"

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <mutex>
#include <optional>
#include <thread>
#include <utility>
#include <vector>

#include "base/check.h"
#include "base/thread.h"
#include "engine/core/engine_core.h"
#include "engine/core/engine_metrics.h"

namespace millrace::engine {
namespace {

// How long a turn without work sleeps at most while deadlines run: the engine's clock need not be the
// system's.
constexpr Duration kDeadlineLookMax = std::chrono::milliseconds(50);
// How often one looks at the file while it reads or writes pages.
constexpr Duration kFileLookEvery = std::chrono::microseconds(300);

using Command = absl::AnyInvocable<void(EngineCore*) &&>;

Status CheckOptions(const EngineOptions& options, const Backend& backend) {
  const int32_t vocab_size = backend.config().vocab_size;
  if (options.batch_tokens_max <= kPageTokens) {
    return InvalidArgument("batch_tokens_max is {}; more than {} are needed", options.batch_tokens_max,
                           kPageTokens);
  }
  const int32_t running_max = options.batch_tokens_max - PrefillShare(options.batch_tokens_max);
  if (options.running_max < 1 || options.running_max > running_max) {
    return InvalidArgument("running_max is {}; with batch_tokens_max {} it can be 1 to {}",
                           options.running_max, options.batch_tokens_max, running_max);
  }
  if (options.waiting_max < 1)
    return InvalidArgument("waiting_max is {}; at least 1 is needed", options.waiting_max);
  if (options.num_vocabulary_tokens < 1 || options.num_vocabulary_tokens > vocab_size) {
    return InvalidArgument("num_vocabulary_tokens is {}; the model has {} logits",
                           options.num_vocabulary_tokens, vocab_size);
  }
  if (backend.kv_layout().num_pages < 1) return InvalidArgument("the backend has no KV pages");
  const size_t page_bytes = backend.kv_layout().page_bytes();
  for (const size_t bytes : {options.host_tier_bytes, options.disk_tier_bytes}) {
    if (bytes > 0 && (bytes < page_bytes || bytes / page_bytes > INT32_MAX)) {
      return InvalidArgument("a tier of {} bytes cannot hold pages of {}", bytes, page_bytes);
    }
  }
  if (options.disk_tier_bytes > 0 && options.host_tier_bytes == 0) {
    return InvalidArgument("pages go to the file through host memory, which has no room for them");
  }
  return OkStatus();
}

class ThreadedEngine final : public Engine {
 public:
  ThreadedEngine(const EngineOptions& options, std::unique_ptr<Backend> backend,
                 std::unique_ptr<PageFile> file, Metrics* metrics)
      : options_(options), backend_(std::move(backend)), core_(options, backend_.get(), std::move(file)) {
    if (metrics != nullptr) metrics_.emplace(metrics);
    Publish(0);
    backend_->OnJoinWanted([this] {
      {
        std::lock_guard lock(mutex_);
        join_wanted_ = true;
      }
      wake_.notify_one();
    });
    thread_ = std::thread([this] { Loop(); });
  }

  ~ThreadedEngine() override {
    {
      std::lock_guard lock(mutex_);
      stopping_ = true;
    }
    wake_.notify_one();
    thread_.join();
    backend_->OnJoinWanted({});
  }

  Status Generate(EngineRequest request, std::unique_ptr<TokenSink> sink) override {
    return Submit(SequenceRole::kGenerate, std::move(request), std::move(sink), nullptr);
  }
  Status Prefill(EngineRequest request, std::unique_ptr<PrefillSink> sink) override {
    PrefillSink* const prefill_sink = sink.get();
    return Submit(SequenceRole::kPrefill, std::move(request), std::move(sink), prefill_sink);
  }
  Status BeginImport(EngineRequest request, std::unique_ptr<TokenSink> sink) override {
    return Submit(SequenceRole::kImport, std::move(request), std::move(sink), nullptr);
  }
  void Grant(RequestId id, int32_t num_pages, GrantCallback callback) override {
    Post([id, num_pages, callback = std::move(callback)](EngineCore* core) mutable {
      core->Grant(id, num_pages, std::move(callback));
    });
  }
  void FinishImport(RequestId id, SampledToken first, bool first_already_sent,
                    std::vector<float> mtp_hidden) override {
    Post([id, first = std::move(first), first_already_sent,
          mtp_hidden = std::move(mtp_hidden)](EngineCore* core) mutable {
      core->FinishImport(id, std::move(first), first_already_sent, std::move(mtp_hidden));
    });
  }
  void ImportToGenerate(RequestId id) override {
    Post([id](EngineCore* core) { core->ImportToGenerate(id); });
  }
  void Cancel(RequestId id) override {
    Post([id](EngineCore* core) { core->Cancel(id); });
  }
  void ReleaseTicket(RequestId id) override {
    Post([id](EngineCore* core) { core->ReleaseTicket(id); });
  }

  EngineStats Stats() const override {
    std::lock_guard lock(mutex_);
    return stats_;
  }
  CacheChanges CacheChangesSince(uint64_t position) const override {
    return core_.cache_log().Since(position);
  }
  bool MakingProgress(Duration stall_max) const override {
    if (broken_.load()) return false;
    const Duration now = options_.clock->Now().time_since_epoch();
    // Order: asleep_ is cleared after turn_ns_ is set (Loop), so an awake thread never shows an old turn.
    if (!asleep_.load()) return now - Duration(turn_ns_.load()) <= stall_max;
    // A thread that is called and does not wake is stalled too.
    const int64_t called_ns = called_ns_.load();
    return called_ns == 0 || now - Duration(called_ns) <= stall_max;
  }
  const ModelConfig& config() const override { return backend_->config(); }
  const KvLayout& kv_layout() const override { return backend_->kv_layout(); }
  std::span<std::byte> kv_memory() override { return backend_->kv_memory(); }
  std::string Describe() const override { return backend_->Describe(); }

 private:
  Status Submit(SequenceRole role, EngineRequest request, std::unique_ptr<TokenSink> sink,
                PrefillSink* prefill_sink);
  void Post(Command command);
  void AddCommand(Command command);  // mutex_ is held

  // Engine thread.
  void Loop();
  void Publish(int32_t submissions_taken);
  void Compute();
  void Sleep();

  const EngineOptions options_;
  const std::unique_ptr<Backend> backend_;

  mutable std::mutex mutex_;  // guards this group; held for a few instructions only, never while computing
  std::condition_variable wake_;
  // Cancel, ReleaseTicket and the like are never refused: callers send a bounded number of them per live
  // request.
  std::vector<Command> commands_;
  int32_t submissions_posted_ = 0;  // not in stats_.waiting yet
  int32_t queued_ = 0;              // by the core, at the last Publish
  EngineStats stats_;
  bool stopping_ = false;
  bool join_wanted_ = false;  // the backend's group may wait for this rank

  std::atomic<int64_t> turn_ns_{0};    // the engine clock at the start of the current turn
  std::atomic<int64_t> called_ns_{0};  // the engine clock when the oldest of commands_ was posted; 0: none
  std::atomic<bool> asleep_{true};
  std::atomic<bool> broken_{false};

  EngineCore core_;  // engine thread
  std::optional<EngineMetrics> metrics_;
  std::thread thread_;  // last: starts when all else is there
};

Status ThreadedEngine::Submit(SequenceRole role, EngineRequest request, std::unique_ptr<TokenSink> sink,
                              PrefillSink* prefill_sink) {
  MR_RETURN_IF_ERROR(CheckRequest(request, options_, config(), kv_layout()));
  {
    std::lock_guard lock(mutex_);
    if (submissions_posted_ + queued_ >= options_.waiting_max) {
      return ResourceExhausted("{} requests are waiting already", submissions_posted_ + queued_);
    }
    ++submissions_posted_;
    AddCommand(
        [role, request = std::move(request), sink = std::move(sink), prefill_sink](EngineCore* core) mutable {
          core->Submit(role, std::move(request), std::move(sink), prefill_sink);
        });
  }
  wake_.notify_one();
  return OkStatus();
}

void ThreadedEngine::Post(Command command) {
  {
    std::lock_guard lock(mutex_);
    AddCommand(std::move(command));
  }
  wake_.notify_one();
}

void ThreadedEngine::AddCommand(Command command) {
  if (commands_.empty()) called_ns_.store(options_.clock->Now().time_since_epoch().count());
  commands_.push_back(std::move(command));
}

void ThreadedEngine::Loop() {
  SetThreadName("engine");
  std::vector<Command> commands;
  while (true) {
    turn_ns_.store(options_.clock->Now().time_since_epoch().count());
    asleep_.store(false);
    int32_t submissions_taken = 0;
    bool stopping = false;
    {
      std::lock_guard lock(mutex_);
      commands.swap(commands_);
      called_ns_.store(0);
      submissions_taken = submissions_posted_;
      stopping = stopping_;
      join_wanted_ = false;
    }
    for (Command& command : commands) std::move(command)(&core_);
    commands.clear();
    if (stopping) break;
    const bool runs = core_.Prepare();
    if (core_.broken()) broken_.store(true);  // a command may have met the backend's failure
    Publish(submissions_taken);
    if (runs) {
      Compute();
    } else if (!core_.broken() && backend_->JoinWanted()) {
      if (!core_.Join().ok()) broken_.store(true);
    } else {
      Sleep();
    }
  }
  core_.EndAll(Cancelled("the engine is shutting down"));
  Publish(0);
}

// submissions_taken: those that are now the core's.
void ThreadedEngine::Publish(int32_t submissions_taken) {
  const EngineStats stats = core_.Stats();
  {
    std::lock_guard lock(mutex_);
    submissions_posted_ -= submissions_taken;
    queued_ = core_.num_queued();
    stats_ = stats;
  }
  if (metrics_.has_value()) metrics_->Update(stats);
}

void ThreadedEngine::Compute() {
  const TimePoint begin = options_.clock->Now();
  const int32_t num_tokens = core_.last_batch_tokens();
  if (!core_.Run().ok()) broken_.store(true);
  if (metrics_.has_value()) metrics_->OnStep(Seconds(options_.clock->Now() - begin), num_tokens);
  Publish(0);
}

void ThreadedEngine::Sleep() {
  const TimePoint deadline = core_.NextDeadline();
  std::unique_lock lock(mutex_);
  asleep_.store(true);
  const auto awake = [this] { return stopping_ || join_wanted_ || !commands_.empty(); };
  if (core_.waits_for_file()) {
    wake_.wait_for(lock, kFileLookEvery, awake);
  } else if (deadline == kNoDeadline) {
    wake_.wait(lock, awake);
  } else {
    wake_.wait_for(lock, std::clamp(deadline - options_.clock->Now(), Duration(0), kDeadlineLookMax), awake);
  }
}

}  // namespace

StatusOr<std::unique_ptr<Engine>> Engine::Create(const EngineOptions& options,
                                                 std::unique_ptr<Backend> backend, Metrics* metrics) {
  MR_CHECK(backend != nullptr && options.clock != nullptr);
  MR_RETURN_IF_ERROR(CheckOptions(options, *backend));
  std::unique_ptr<PageFile> file;
  if (options.disk_tier_bytes > 0) {
    const size_t page_bytes = backend->kv_layout().page_bytes();
    MR_ASSIGN_OR_RETURN(file, CreatePageFile(options.disk_tier_directory, page_bytes,
                                             static_cast<int32_t>(options.disk_tier_bytes / page_bytes)));
  }
  return std::make_unique<ThreadedEngine>(options, std::move(backend), std::move(file), metrics);
}

}  // namespace millrace::engine
