#pragma once
// The feed-forward half of a layer: dense, or routed experts plus the shared one as one expert more. Tokens
// are grouped by expert, so that an expert's weights are read once per step.
//
// A step is two passes over the weights with one barrier between them:
//   gate, up, SwiGLU and the next quantisation   unit: 64 inner columns of one expert, some of its tokens
//   down, times the router's weight, added to the residual stream   unit: output columns, all experts in turn
// Units of a pass come from one counter. The second pass is even whatever the routing, and needs neither a
// buffer per expert nor a merge: an output column belongs to one thread, which adds the experts in ascending
// order.

#include <functional>
#include <optional>
#include <span>
#include <vector>

#include "engine/backend/cpu/activations.h"
#include "engine/backend/cpu/cpu_weights.h"
#include "engine/backend/cpu/thread_pool.h"
#include "engine/moe/expert_group.h"
#include "engine/moe/router.h"

namespace millrace::engine {

// y[t] = w x[t] (or, with `scale`, y[t] += scale[t] * (w x[t])), in parallel over output rows. x[t] is a row
// in the form that w's format wants.
void ParallelGemm(ThreadPool& pool, const KernelTable& kernels, const PackedMatrix& w,
                  std::span<const void* const> x, std::span<float* const> y, const float* scale = nullptr);

// Holds the scratch memory of one backend; sized once. One step at a time.
class FfnRunner {
 public:
  // `group` is null for a single process; borrowed.
  FfnRunner(const ModelConfig& config, const KernelTable& kernels, WeightFormat format, int32_t rows_max,
            ThreadPool& pool, ExpertGroup* group = nullptr);

  // Called with each row's chosen experts.
  using Trace = std::function<void(int32_t row, std::span<const int32_t> experts)>;
  // residual[t] += FFN(x[t]) for each row. `normed` is x in fp32, for the router; x is the same in the
  // weights' format. `trace` may be empty.
  void Run(const LayerWeights& layer, std::span<const void* const> normed, std::span<const void* const> x,
           std::span<float* const> residual, const Trace& trace);

  // The same for an MoE layer of a group, whose MoE layers are counted by `index`: rows go to the ranks that
  // hold their experts, x may be empty. `experts` are those that this rank holds now. moe_group.cc. An error
  // is the group's.
  Status RunInGroup(const LayerWeights& layer, std::span<const FfnWeights> experts, int32_t index,
                    std::span<const void* const> normed, std::span<const void* const> x,
                    std::span<float* const> residual, const Trace& trace);

 private:
  // Rows that one FFN (an expert, the shared expert, a dense layer) works on.
  struct Job {
    const FfnWeights* ffn = nullptr;
    int32_t first = 0;  // into in_rows_, inner_rows_, out_rows_, row_scales_
    int32_t count = 0;
  };
  // A piece of the first pass.
  struct Unit {
    int32_t job = 0;
    int32_t block = 0;  // of 64 inner columns
    int32_t first = 0;  // row, as in Job
    int32_t count = 0;
  };
  void Route(const LayerWeights& layer, std::span<const void* const> normed, const Trace& trace);
  void GroupByExpert(const LayerWeights& layer, std::span<const void* const> x,
                     std::span<float* const> residual);
  void AddJob(const FfnWeights& ffn, std::span<const void* const> x, std::span<float* const> residual);
  void AddRow(const void* x, float* out, std::optional<float> scale, size_t inner_bytes);
  void ClearJobs();
  void RunJobs();
  void SendRows(int32_t index, std::span<const void* const> x);
  Status TakeRows(std::span<const FfnWeights> experts);
  Status ListPairs(std::span<const FfnWeights> experts);
  void AddProducts(std::span<float* const> residual, bool shared);
  void GateUp(const Unit& unit, const char* next, int thread);
  void Down(int32_t strip_begin, int32_t strip_end, const char* next);

  const ModelConfig& config_;
  const RouterShape shape_;
  const KernelTable& kernels_;
  const WeightFormat format_;
  ThreadPool& pool_;

  Rows router_logits_;                              // [rows, experts]
  std::vector<int32_t> expert_ids_;                 // [rows, top_k], in order of choice
  std::vector<float> expert_weights_;               // [rows, top_k]
  std::vector<std::vector<float>> router_scratch_;  // per thread
  std::vector<int32_t> expert_begin_;               // [experts + 1]
  std::vector<int32_t> expert_next_;
  std::vector<const void*> in_rows_;
  std::vector<void*> inner_rows_;
  std::vector<float*> out_rows_;
  std::vector<float> row_scales_;  // none: products go to out_rows_ as they are
  AlignedBytes inner_;  // SwiGLU's result of every (row, FFN) of the step, in the format that down wants
  size_t inner_used_ = 0;
  std::vector<Rows> gate_up_;  // per thread: [unit rows, 128]
  std::vector<Job> jobs_;
  std::vector<Unit> units_;

  // In a group.
  struct Pair {  // that this rank computes
    int32_t home = 0;
    int32_t expert = 0;
    const std::byte* row = nullptr;
  };
  std::vector<Pair> pairs_;
  ExpertGroup* const group_;
  Rows shared_;                         // [rows, hidden]: the shared expert's products
  std::vector<const float*> products_;  // [rows, top_k]: of every chosen expert
  std::vector<int32_t> order_;          // [rows, top_k]: slots by ascending expert
};

}  // namespace millrace::engine
