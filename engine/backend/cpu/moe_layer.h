#pragma once
// The feed-forward half of a layer: dense, or routed experts plus the shared one. Tokens are grouped by
// expert, so that an expert's weights are read once per step.

#include <functional>
#include <span>
#include <vector>

#include "engine/backend/cpu/cpu_weights.h"
#include "engine/backend/cpu/thread_pool.h"
#include "engine/moe/router.h"

namespace millrace::engine {

// Weights times rows, in parallel over blocks of output rows. x[t]: [w.cols], y[t]: [w.rows].
using GemmKernel = void (*)(const PackedMatrix&, int32_t, int32_t, const float* const*, float* const*,
                            int32_t);
void ParallelGemm(ThreadPool& pool, GemmKernel kernel, const PackedMatrix& w, std::span<const float* const> x,
                  std::span<float* const> y);

// Holds the scratch memory of one backend; sized once. One step at a time.
class FfnRunner {
 public:
  FfnRunner(const ModelConfig& config, const KernelTable& kernels, bool bf16, int32_t rows_max,
            ThreadPool& pool);

  // Called with each row's chosen experts.
  using Trace = std::function<void(int32_t row, std::span<const int32_t> experts)>;
  // out[t] = FFN(x[t]) for each row; out does not overlap x. `trace` may be empty.
  void Run(const LayerWeights& layer, std::span<const float* const> x, std::span<float* const> out,
           const Trace& trace);

 private:
  // Rows that one FFN (an expert, the shared expert, a dense layer) works on.
  struct Job {
    const FfnWeights* ffn = nullptr;
    size_t first = 0;  // into rows_in_, gate_rows_, up_rows_, out_rows_
    size_t count = 0;
  };
  void Route(const LayerWeights& layer, std::span<const float* const> x, const Trace& trace);
  void GroupByExpert(const LayerWeights& layer, std::span<const float* const> x);
  void AddJob(const FfnWeights& ffn, std::span<const float* const> x, std::span<float* const> out);
  void RunJobs();
  void Combine(const LayerWeights& layer, std::span<float* const> out);

  const ModelConfig& config_;
  const RouterShape shape_;
  const KernelTable& kernels_;
  const GemmKernel gemm_;
  ThreadPool& pool_;

  std::vector<float> router_logits_;  // [rows, experts]
  std::vector<float*> router_rows_;
  std::vector<int32_t> expert_ids_;    // [rows, top_k], in order of choice
  std::vector<float> expert_weights_;  // [rows, top_k]
  std::vector<float> router_scratch_;
  std::vector<float> expert_out_;     // [rows, top_k, hidden]
  std::vector<float> activations_;    // gate and up of every (row, FFN) of the step
  std::vector<size_t> expert_begin_;  // [experts + 1]
  std::vector<const float*> rows_in_;
  std::vector<float*> gate_rows_;
  std::vector<float*> up_rows_;
  std::vector<float*> out_rows_;
  std::vector<Job> jobs_;
  size_t activations_used_ = 0;
};

}  // namespace millrace::engine
