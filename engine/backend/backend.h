#pragma once
// The seam between the engine and the hardware.

#include <cstddef>
#include <functional>
#include <memory>
#include <span>
#include <string>

#include "absl/functional/function_ref.h"
#include "base/status.h"
#include "engine/batch.h"
#include "engine/kv/layout.h"
#include "engine/model/config.h"

namespace millrace::engine {

// Called on the engine thread, in layer order, as soon as this batch's K and V of `layer` are in their pages;
// for an exported segment: in the pages' bytes in kv_memory().
using LayerDone = std::function<void(int32_t layer)>;

// Weights in the form that one kind of backend wants. Immutable; shared by the backends of one process.
class Weights {
 public:
  virtual ~Weights() = default;
  virtual const ModelConfig& config() const = 0;
  virtual size_t bytes() const = 0;
};

// One model over one pool of KV pages. Engine thread only, except where said.
class Backend {
 public:
  virtual ~Backend() = default;
  virtual const ModelConfig& config() const = 0;  // any thread
  virtual const KvLayout& kv_layout() const = 0;  // any thread
  // Host memory that the outside (transfer, tiers) reads and writes, kv_layout().total_bytes() long, zeroed
  // at start. A CPU backend's own pool; a device backend computes in a pool of its own and this is its
  // mirror, which agrees with the device only where ToHost, FromHost or Segment::exported say so. Any thread.
  virtual std::span<std::byte> kv_memory() = 0;
  // The bytes of these pages in kv_memory(), all layers, are what the last Forward left, when it returns.
  // Nothing to do where kv_memory() is the pool itself. An error means what Forward's does.
  virtual Status ToHost(std::span<const PageId> pages);
  // The other way: what the outside wrote into these pages of kv_memory() is what Forward sees from now on,
  // and the host bytes may change again, when it returns.
  virtual Status FromHost(std::span<const PageId> pages);
  // Runs one step. The output is a pure function of each segment's own tokens and KV: neither batch
  // composition nor chunking nor thread count changes a bit of it. An error means the process cannot go on
  // computing.
  virtual StatusOr<StepOutput> Forward(const Batch& batch, const LayerDone& layer_done) = 0;
  // Runs the MTP layer, if the pool has pages for it (one layer more than the model). Logits of each
  // segment's last row, for the token after its next one: [segments, vocab_size], valid until the next call
  // of either kind.
  virtual StatusOr<std::span<const float>> ForwardMtp(std::span<const MtpSegment> segments);
  // Runs task(i) for i in [0, num_tasks), each once, in any order and several at once on the threads that
  // this backend computes with on the host, and returns when all are done: what the engine has to do between
  // two steps. `work` says roughly how many multiply-adds they would be worth together; little stays on this
  // thread.
  virtual void RunParallel(int64_t num_tasks, int64_t work, absl::FunctionRef<void(int64_t)> task);
  // A backend that is one rank of an expert group (engine/moe/expert_group.h) computes in lockstep with the
  // others. True while they wait for this one: then Forward is called, with an empty batch where there is no
  // work.
  virtual bool JoinWanted() { return false; }
  // `wake` is called from any thread when that may have become true; an empty one takes it back.
  virtual void OnJoinWanted(const std::function<void()>& /*wake*/) {}
  virtual std::string Describe() const = 0;  // "cpu, avx512, 2 threads, bf16"
};

inline Status Backend::ToHost(std::span<const PageId>) { return OkStatus(); }
inline Status Backend::FromHost(std::span<const PageId>) { return OkStatus(); }
inline StatusOr<std::span<const float>> Backend::ForwardMtp(std::span<const MtpSegment>) {
  return Unimplemented("this backend does not run the MTP layer by itself");
}
inline void Backend::RunParallel(int64_t num_tasks, int64_t /*work*/, absl::FunctionRef<void(int64_t)> task) {
  for (int64_t i = 0; i < num_tasks; ++i) task(i);
}

}  // namespace millrace::engine
