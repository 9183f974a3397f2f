#pragma once
// The CPU backend: weights packed in row strips, kernels chosen by cpuid at start, one pool of worker
// threads.

#include <functional>
#include <memory>
#include <string>

#include "base/clock.h"
#include "engine/backend/backend.h"
#include "engine/model/tensor_source.h"
#include "engine/moe/expert_group.h"

namespace millrace::engine {

enum class Isa { kAuto, kPortable, kAvx2, kAvx512, kAmx };
StatusOr<Isa> ParseIsa(const std::string& name);  // "auto", "portable", "avx2", "avx512", "amx"

// kFloat32: weights and KV in fp32 (FP8 dequantised exactly): for tests and small models. kBfloat16: weights
// and KV in bf16. Activations and sums are fp32 in both.
enum class Precision { kFloat32, kBfloat16 };
StatusOr<Precision> ParsePrecision(const std::string& name);  // "float32", "bfloat16"

// What the matrices (experts, projections, head) are held in. kNone: as `precision` says. kInt8 and kInt4:
// integers with a bf16 scale per 64 columns of a row, 8.25 and 4.25 bits per weight (the head stays at 8.25),
// made at load from whatever is stored; activations are then rounded to 8 bits per 64 values in front of each
// product. The router, norms and the embedding are never quantised.
enum class Quantization { kNone, kInt8, kInt4 };
StatusOr<Quantization> ParseQuantization(const std::string& name);  // "none", "int8", "int4"

// Called from the loading thread with the part that is done and the whole, in one unit, at most every 50 ms
// and at the end.
using LoadProgress = std::function<void(size_t done, size_t total)>;

struct CpuWeightsOptions {
  Precision precision = Precision::kBfloat16;
  Quantization quantization = Quantization::kNone;
  int num_threads = 0;  // for packing; 0 = every usable processor
  LoadProgress progress;
  // Where packed weights are kept for the next start, in a file of their own size; empty: nowhere. What
  // cannot be read there (absent, other source, damaged) is made again and written again, with a line in the
  // log; a cache that cannot be written costs a line and nothing else.
  std::string cache_directory;
  std::string source_digest;  // tells one source from another; a changed one finds no cache
  // Routed experts to load, of a layer as tensors are numbered; empty: all. Belongs into source_digest.
  std::function<bool(int32_t layer, int32_t expert)> holds;
};

// Packs a checkpoint that CheckTensors accepted, tensor by tensor: beside the packed weights, a few MiB per
// thread are in memory at a time. Errors name the tensor.
StatusOr<std::shared_ptr<const Weights>> LoadCpuWeights(const TensorSource& source, const ModelConfig& config,
                                                        const CpuWeightsOptions& options);

// Part of a backend that is one rank of an expert group.
struct CpuGroupOptions {
  ExpertGroup* group = nullptr;          // null: a single process. Outlives the backend
  const TensorSource* source = nullptr;  // whence experts that move here are read; outlives the backend
  int32_t slots_per_layer = 0;  // experts of a layer that this rank is to hold at most, but in an emergency
  Duration rebalance_every = std::chrono::seconds(30);  // zero: never
  // How long a pass waits for experts whose last holder was lost.
  Duration reload_max = std::chrono::minutes(5);
};

struct CpuBackendOptions {
  int num_threads = 0;  // 0 = every usable processor
  int32_t num_pages = 256;
  int32_t batch_tokens_max = 512;  // tokens in one Forward; sizes the scratch memory
  int32_t logit_rows_max = 64;     // sum of num_logits in one Forward
  bool with_mtp = false;           // give the MTP layer KV pages and accept Segment::next_tokens
  Isa isa = Isa::kAuto;            // a set that the processor lacks is InvalidArgument
  CpuGroupOptions group;
};

// The shape of a group of such backends. `weights` must come from LoadCpuWeights.
StatusOr<GroupShape> CpuGroupShape(const Weights& weights, const CpuBackendOptions& options,
                                   int32_t num_ranks, uint64_t model_digest);

// `weights` must come from LoadCpuWeights. ResourceExhausted names the bytes when memory cannot be had.
StatusOr<std::unique_ptr<Backend>> MakeCpuBackend(std::shared_ptr<const Weights> weights,
                                                  const CpuBackendOptions& options);

// Shows every token's chosen experts, for tests: `row` counts the step's tokens in batch order, layers are in
// order with the MTP layer last. Called on the engine thread. `backend` must come from MakeCpuBackend.
using RouterTrace = std::function<void(int32_t layer, int32_t row, std::span<const int32_t> experts)>;
void SetRouterTrace(Backend& backend, RouterTrace trace);

}  // namespace millrace::engine
