#include "server/worker/worker_context.h"

#include <algorithm>

namespace millrace::server {

// Notifies under the lock: the last touch of a holder is then the unlock.
void ActiveCount::Add(int by) {
  std::lock_guard lock(mutex_);
  count_ += by;
  if (count_ == 0) zero_.notify_all();
}

bool ActiveCount::WaitZero(TimePoint deadline) {
  std::unique_lock lock(mutex_);
  return zero_.wait_until(lock, deadline, [this] { return count_ == 0; });
}

void WorkerSpeed::OnPrefill(int32_t tokens, TimePoint begin, TimePoint end) {
  constexpr double kKeep = 0.8;
  std::lock_guard lock(mutex_);
  // Prompts that overlap share the engine: the time since the last one ended belongs to this one.
  const double seconds = Seconds(end - std::max(begin, last_end_));
  last_end_ = end;
  if (seconds <= 0) return;
  tokens_ = kKeep * tokens_ + tokens;
  seconds_ = kKeep * seconds_ + seconds;
  report_.prefill_tokens_per_second = tokens_ / seconds_;
  ++report_.prefill_samples;
}

void WorkerSpeed::OnTokenGap(Duration gap) {
  constexpr double kKeep = 0.95;
  std::lock_guard lock(mutex_);
  double& mean = report_.token_gap_seconds;
  mean = report_.token_gap_samples == 0 ? Seconds(gap) : kKeep * mean + (1 - kKeep) * Seconds(gap);
  ++report_.token_gap_samples;
}

void PeerEpochs::Note(transfer::PeerId peer, uint64_t epoch) {
  std::lock_guard lock(mutex_);
  epochs_[peer] = epoch;
}

std::map<transfer::PeerId, uint64_t> PeerEpochs::Of(const std::vector<transfer::PathSnapshot>& paths) {
  std::lock_guard lock(mutex_);
  std::map<transfer::PeerId, uint64_t> known;
  for (const transfer::PathSnapshot& path : paths) {
    const auto found = epochs_.find(path.peer);
    if (found != epochs_.end()) known.insert(*found);
  }
  epochs_ = known;
  return known;
}

WorkerSpeed::Report WorkerSpeed::report() const {
  std::lock_guard lock(mutex_);
  return report_;
}

WorkerContext::WorkerContext(const WorkerOptions& worker_options, const WorkerSeams& seams,
                             engine::Engine* worker_engine, transfer::Transfer* worker_transfer,
                             transfer::RegionId kv_region)
    : options(worker_options),
      engine(worker_engine),
      transfer(worker_transfer),
      layout(engine->kv_layout()),
      layout_hash(layout.CompatibilityHash()),
      kv(engine->kv_memory()),
      region(kv_region),
      descriptor(transfer->Descriptor()),
      grammars(options.tokenizer == nullptr ? nullptr
                                            : std::make_unique<engine::GrammarCache>(*options.tokenizer)),
      metrics(options.metrics),
      prefill_health({}, seams.control, seams.seed),
      role(options.role),
      group(options.group == nullptr ? nullptr
                                     : std::make_unique<GroupReporter>(options.group, options.metrics)),
      control(*seams.control),
      digest(*seams.digest),
      heartbeat(*seams.heartbeat),
      prefill_workers(*seams.prefill_workers) {}

WorkerContext::~WorkerContext() = default;

Status WorkerContext::Constrain(engine::SamplingParams* sampling) {
  if (sampling->constraint.empty()) return OkStatus();
  if (grammars == nullptr) return InvalidArgument("this worker has no tokenizer for constrained answers");
  MR_ASSIGN_OR_RETURN(sampling->mask, grammars->MaskFor(sampling->constraint));
  return OkStatus();
}

void AbortAll(std::vector<WorkerCall*> calls, const Status& status) {
  for (WorkerCall* const call : calls) call->Abort(status);
}

}  // namespace millrace::server
