#include "server/worker/worker_context.h"

#include <algorithm>

#include "server/rpc/channel.h"

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

void PrefillRate::OnPrefill(int32_t tokens, TimePoint begin, TimePoint end) {
  constexpr double kKeep = 0.8;
  // Prompts that overlap share the engine: the time since the last one ended belongs to this one.
  const double seconds = Seconds(end - std::max(begin, last_end_));
  last_end_ = end;
  if (seconds <= 0) return;
  tokens_ = kKeep * tokens_ + tokens;
  seconds_ = kKeep * seconds_ + seconds;
}

WorkerContext::WorkerContext(const WorkerOptions& worker_options, engine::Engine* worker_engine,
                             transfer::Transfer* worker_transfer, transfer::RegionId kv_region)
    : options(worker_options),
      engine(worker_engine),
      transfer(worker_transfer),
      layout(engine->kv_layout()),
      layout_hash(layout.CompatibilityHash()),
      kv(engine->kv_memory()),
      region(kv_region),
      descriptor(transfer->Descriptor()),
      channels(std::make_unique<ChannelPool>(grpc::InsecureChannelCredentials())),
      grammars(options.tokenizer == nullptr ? nullptr
                                            : std::make_unique<engine::GrammarCache>(*options.tokenizer)),
      metrics(options.metrics) {}

WorkerContext::~WorkerContext() = default;

Status WorkerContext::Constrain(engine::SamplingParams* sampling) {
  if (sampling->constraint.empty()) return OkStatus();
  if (grammars == nullptr) return InvalidArgument("this worker has no tokenizer for constrained answers");
  MR_ASSIGN_OR_RETURN(sampling->mask, grammars->MaskFor(sampling->constraint));
  return OkStatus();
}

}  // namespace millrace::server
