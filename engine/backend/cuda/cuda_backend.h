#pragma once
// The CUDA backend: one Hopper GPU, weights and KV in bf16. A build without the CUDA toolkit has these
// functions too; they say so.

#include <functional>
#include <memory>

#include "engine/backend/backend.h"
#include "engine/model/checkpoint.h"

namespace millrace::engine {

struct CudaWeightsOptions {
  int num_threads = 0;                                      // for reading; 0 = every usable processor
  std::function<void(size_t done, size_t total)> progress;  // loading thread; as CpuWeightsOptions::progress
};

// Copies a checkpoint that CheckTensors accepted to the current GPU. Errors: Unavailable without a GPU or the
// toolkit, Unimplemented for a shape that the kernels cannot do, ResourceExhausted with the numbers, or the
// tensor's own.
StatusOr<std::shared_ptr<const Weights>> LoadCudaWeights(const Checkpoint& checkpoint,
                                                         const ModelConfig& config,
                                                         const CudaWeightsOptions& options);

struct CudaBackendOptions {
  int32_t num_pages = 256;
  int32_t batch_tokens_max = 512;  // tokens in one Forward; sizes the scratch memory
  int32_t logit_rows_max = 64;     // sum of num_logits in one Forward
  bool with_mtp = false;           // give the MTP layer KV pages and accept Segment::next_tokens
};

// `weights` must come from LoadCudaWeights. ResourceExhausted names every part of the memory plan.
// kv_memory() is a page-locked mirror, as long as the pool on the device.
StatusOr<std::unique_ptr<Backend>> MakeCudaBackend(std::shared_ptr<const Weights> weights,
                                                   const CudaBackendOptions& options);

}  // namespace millrace::engine
