#pragma once
// The seam between the engine and the hardware.

#include <cstddef>
#include <functional>
#include <memory>
#include <span>
#include <string>

#include "base/status.h"
#include "engine/batch.h"
#include "engine/kv/layout.h"
#include "engine/model/config.h"

namespace millrace::engine {

// Called on the engine thread, in layer order, as soon as this batch's K and V of `layer` are in their pages.
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
  // The pool's memory, kv_layout().total_bytes() long, zeroed at start. Host memory here; a device backend
  // gives device memory, which only the transfer engine touches from outside. Any thread.
  virtual std::span<std::byte> kv_memory() = 0;
  // Runs one step. The output is a pure function of each segment's own tokens and KV: neither batch
  // composition nor chunking nor thread count changes a bit of it. An error means the process cannot go on
  // computing.
  virtual StatusOr<StepOutput> Forward(const Batch& batch, const LayerDone& layer_done) = 0;
  virtual std::string Describe() const = 0;  // "cpu, avx512, 2 threads, bf16"
};

}  // namespace millrace::engine
