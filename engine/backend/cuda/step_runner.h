#pragma once
// Runs steps of one model over one pool of KV pages on one device. Everything is allocated and every decode
// graph is captured at creation; a step allocates nothing. Builds without the rest of Millrace
// (cuda_backend.cc is the seam).

#include <cuda_runtime.h>

#include <functional>
#include <map>
#include <memory>
#include <span>
#include <vector>

#include "engine/backend/cuda/device_model.h"
#include "engine/backend/cuda/gemm.h"
#include "engine/backend/cuda/memory.h"
#include "engine/backend/cuda/result.h"
#include "engine/backend/cuda/step_inputs.h"
#include "engine/batch.h"

namespace millrace::engine::cuda {

struct DrawRow;
struct GroupedGemmArgs;
struct SelectExpertsArgs;

struct StepRunnerOptions {
  KvLayout kv;             // bf16; num_layers = the model's layers, the MTP layer's last if it has pages
  int32_t rows_max = 512;  // tokens in one step
  int32_t logit_rows_max = 64;
  bool with_mtp = false;
  bool mirror =
      true;  // pinned host memory of the pool's size; without it nothing can be exported or imported
};

// Rows that the kernels compute for `rows` tokens: decode graphs and matrix products exist for these counts
// only.
int32_t PadRows(int32_t rows);

// One thread at a time. After an error nothing but destruction makes sense: the device's state is unknown.
class StepRunner {
 public:
  using LayerDone = std::function<void(int32_t layer)>;

  // Borrows `model`, which must outlive the runner. An error for lack of memory names every part of the plan.
  static Result Create(const DeviceModel& model, const StepRunnerOptions& options,
                       std::unique_ptr<StepRunner>* runner);
  ~StepRunner();

  // As Backend::Forward. Token and page ids are in range; *output is valid until the next Run.
  Result Run(const Batch& batch, const LayerDone& layer_done, StepOutput* output);
  // As the functions of Backend with these names.
  Result ToHost(std::span<const PageId> pages);
  Result FromHost(std::span<const PageId> pages);
  std::span<std::byte> mirror() const { return {mirror_.data(), mirror_.bytes()}; }

  std::span<std::byte> kv_pool() const { return {kv_.data(), kv_.bytes()}; }  // device memory

  // The device work of a decode step over `rows` sequences, without inputs or outputs crossing: what
  // benchmarks time. Whatever the last Run left as inputs is used.
  Result ReplayDecode(int32_t rows, cudaStream_t* stream);
  size_t scratch_bytes() const { return scratch_.bytes(); }

 private:
  struct Buffers;
  // One run through layers: what it reads, on the device, and how much it computes, padding included.
  struct Pass {
    PassInputs inputs;
    PassCounts counts;
    const int32_t* page_table = nullptr;
    const Batch* exporting = nullptr;  // the batch, if one of its segments is exported
  };
  StepRunner(const DeviceModel& model, const StepRunnerOptions& options);

  Result Allocate();
  size_t PlaceBuffers(std::byte* base);
  size_t PlaceHost(std::byte* base);
  size_t AttentionWorkspaceBytes() const;
  Result CaptureGraphs();
  Result UploadPass(const Batch& batch, PassKind kind, const PassCounts& padded, Pass* pass);
  Result EnqueueMain(const Pass& pass);
  Result EnqueueMtp(const Pass& pass);
  Result EnqueueLayer(int32_t index, const Pass& pass, const float* next_norm);
  Result EnqueueAttention(const DeviceLayer& layer, int32_t index, const Pass& pass);
  Result EnqueueSingles(const Pass& pass, const __nv_bfloat16* kv_layer);
  Result EnqueueLonger(const Pass& pass, const __nv_bfloat16* kv_layer);
  Result EnqueueDense(const DeviceLayer& layer, const Pass& pass, const float* next_norm);
  Result EnqueueRouting(const DeviceLayer& layer, const Pass& pass);
  SelectExpertsArgs Selection(const DeviceLayer& layer, const Pass& pass) const;
  bool FewRows(const DeviceLayer& layer, const Pass& pass) const;
  Result EnqueueExperts(const DeviceLayer& layer, const Pass& pass);
  Result EnqueueFewRowsExperts(const DeviceLayer& layer, const Pass& pass);
  Result EnqueueCombine(const Pass& pass, const float* next_norm);
  Result QuantizeInput(const __nv_bfloat16* x, int32_t rows, GroupedGemmArgs* args);
  Result EnqueueHead(const float* norm, const Pass& pass, float* logits);
  Result EnqueueExport(const Batch& batch, int32_t layer);
  Result Norm(const float* bias, const float* weight, int32_t rows);
  Result Multiply(const __nv_bfloat16* weights, const __nv_bfloat16* x, void* out, bool out_float,
                  bool accumulate, int32_t rows, int32_t n, int32_t k);
  Result EnqueueOutputs(const Batch& batch, int32_t rows, StepOutput* output);
  Result FetchUndrawn(const Batch& batch, StepOutput* output);
  Result TellLayers(bool exports, int32_t layers, const LayerDone& layer_done);
  Result CopyPages(std::span<const PageId> pages, cudaMemcpyKind direction);
  bool IsDecode(const Batch& batch, const PassCounts& counts) const;
  size_t InputsMax() const;
  int64_t table_stride() const { return PagesFor(shape_.max_position); }

  const DeviceModel& model_;
  const ModelShape& shape_;
  const StepRunnerOptions options_;
  int32_t padded_rows_max_ = 0;
  int32_t padded_logits_max_ = 0;
  int32_t graph_rows_max_ = 0;  // decode batches up to here run as graphs

  cudaStream_t compute_ = nullptr;
  cudaStream_t copy_ = nullptr;
  std::vector<cudaEvent_t> kv_written_;        // per KV layer, on compute_
  std::vector<cudaEvent_t> exported_;          // per KV layer, on copy_
  std::map<int32_t, cudaGraphExec_t> graphs_;  // by padded rows

  std::unique_ptr<Gemm> gemm_;
  DeviceMemory kv_;
  DeviceMemory scratch_;
  PinnedMemory mirror_;               // of kv_
  PinnedMemory host_;                 // inputs and logits
  std::unique_ptr<Buffers> buffers_;  // into scratch_
  int32_t* host_inputs_[2] = {};      // by PassKind: a PassInputs block
  int32_t* host_tables_[2] = {};      // [rows, table_stride]
  float* host_logits_ = nullptr;      // [padded logits, vocab]
  DrawRow* host_draws_ = nullptr;     // [logit rows]
  int32_t* host_drawn_ = nullptr;     // [logit rows]
  float* host_mtp_logits_ = nullptr;
};

}  // namespace millrace::engine::cuda
