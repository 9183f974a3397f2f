#include "engine/backend/cpu/moe_layer.h"

#include <algorithm>

#include "base/check.h"

namespace millrace::engine {
namespace {

constexpr int32_t kStripsPerTask = 4;  // 64 output rows

int64_t TasksOf(const PackedMatrix& w) { return (w.strips() + kStripsPerTask - 1) / kStripsPerTask; }

int64_t WorkOf(const PackedMatrix& w, size_t rows) {
  return int64_t{w.rows} * w.cols * static_cast<int64_t>(rows);
}

}  // namespace

void ParallelGemm(ThreadPool& pool, GemmKernel kernel, const PackedMatrix& w, std::span<const float* const> x,
                  std::span<float* const> y) {
  MR_CHECK(x.size() == y.size());
  if (x.empty()) return;
  pool.Run(TasksOf(w), WorkOf(w, x.size()), [&](int64_t task) {
    const auto begin = static_cast<int32_t>(task) * kStripsPerTask;
    kernel(w, begin, std::min(begin + kStripsPerTask, w.strips()), x.data(), y.data(),
           static_cast<int32_t>(x.size()));
  });
}

FfnRunner::FfnRunner(const ModelConfig& config, const KernelTable& kernels, bool bf16, int32_t rows_max,
                     ThreadPool& pool)
    : config_(config),
      shape_(MakeRouterShape(config)),
      kernels_(kernels),
      gemm_(bf16 ? kernels.gemm_bf16 : kernels.gemm_f32),
      pool_(pool) {
  const auto rows = static_cast<size_t>(rows_max);
  const auto slots = rows * static_cast<size_t>(config.experts_per_token);
  const auto experts = static_cast<size_t>(config.num_experts);
  router_logits_.resize(rows * experts);
  expert_ids_.resize(slots);
  expert_weights_.resize(slots);
  router_scratch_.resize(2 * experts + static_cast<size_t>(config.num_groups));
  expert_out_.resize(slots * static_cast<size_t>(config.hidden_size));
  const size_t moe_width = slots * static_cast<size_t>(config.moe_intermediate_size) +
                           rows * static_cast<size_t>(config.shared_intermediate_size);
  const size_t dense_width =
      config.num_dense_layers > 0 ? rows * static_cast<size_t>(config.intermediate_size) : 0;
  activations_.resize(2 * std::max(moe_width, dense_width));
  for (auto* list : {&gate_rows_, &up_rows_, &out_rows_}) list->reserve(slots + rows);
  rows_in_.reserve(slots + rows);
}

void FfnRunner::Run(const LayerWeights& layer, std::span<const float* const> x, std::span<float* const> out,
                    const Trace& trace) {
  jobs_.clear();
  rows_in_.clear();
  gate_rows_.clear();
  up_rows_.clear();
  out_rows_.clear();
  activations_used_ = 0;
  if (!layer.moe) {
    AddJob(layer.ffn, x, out);
    return RunJobs();
  }
  Route(layer, x, trace);
  GroupByExpert(layer, x);
  if (layer.ffn.gate.rows > 0) AddJob(layer.ffn, x, out);  // the shared expert writes where the sum is made
  RunJobs();
  Combine(layer, out);
}

void FfnRunner::Route(const LayerWeights& layer, std::span<const float* const> x, const Trace& trace) {
  const auto experts = static_cast<size_t>(config_.num_experts);
  const auto top_k = static_cast<size_t>(config_.experts_per_token);
  router_rows_.clear();
  for (size_t t = 0; t < x.size(); ++t) router_rows_.push_back(router_logits_.data() + t * experts);
  ParallelGemm(pool_, kernels_.gemm_f32, layer.router, x, router_rows_);
  for (size_t t = 0; t < x.size(); ++t) {
    const auto ids = std::span(expert_ids_).subspan(t * top_k, top_k);
    RouteToken(shape_, {router_rows_[t], experts}, layer.expert_bias, router_scratch_, ids,
               std::span(expert_weights_).subspan(t * top_k, top_k));
    if (trace) trace(static_cast<int32_t>(t), ids);
  }
}

// Counting sort of (row, slot) by expert.
void FfnRunner::GroupByExpert(const LayerWeights& layer, std::span<const float* const> x) {
  const auto hidden = static_cast<size_t>(config_.hidden_size);
  const auto top_k = static_cast<size_t>(config_.experts_per_token);
  const size_t slots = x.size() * top_k;
  expert_begin_.assign(layer.experts.size() + 1, 0);
  for (size_t s = 0; s < slots; ++s) ++expert_begin_[static_cast<size_t>(expert_ids_[s]) + 1];
  for (size_t e = 0; e < layer.experts.size(); ++e) expert_begin_[e + 1] += expert_begin_[e];
  std::vector<size_t> next(expert_begin_.begin(), expert_begin_.end() - 1);
  rows_in_.resize(slots);
  out_rows_.resize(slots);
  gate_rows_.resize(slots);
  up_rows_.resize(slots);
  for (size_t s = 0; s < slots; ++s) {
    const size_t place = next[static_cast<size_t>(expert_ids_[s])]++;
    rows_in_[place] = x[s / top_k];
    out_rows_[place] = expert_out_.data() + s * hidden;
  }
  const auto width = static_cast<size_t>(config_.moe_intermediate_size);
  for (size_t place = 0; place < slots; ++place) {
    gate_rows_[place] = activations_.data() + 2 * place * width;
    up_rows_[place] = gate_rows_[place] + width;
  }
  activations_used_ = 2 * slots * width;
  for (size_t e = 0; e < layer.experts.size(); ++e) {
    const size_t count = expert_begin_[e + 1] - expert_begin_[e];
    if (count > 0) jobs_.push_back({&layer.experts[e], expert_begin_[e], count});
  }
}

void FfnRunner::AddJob(const FfnWeights& ffn, std::span<const float* const> x, std::span<float* const> out) {
  const auto width = static_cast<size_t>(ffn.gate.rows);
  jobs_.push_back({&ffn, rows_in_.size(), x.size()});
  for (size_t t = 0; t < x.size(); ++t) {
    rows_in_.push_back(x[t]);
    out_rows_.push_back(out[t]);
    gate_rows_.push_back(activations_.data() + activations_used_);
    up_rows_.push_back(gate_rows_.back() + width);
    activations_used_ += 2 * width;
  }
  MR_CHECK(activations_used_ <= activations_.size());
}

// Two passes with one barrier between: gate, up and SwiGLU; then down.
void FfnRunner::RunJobs() {
  std::vector<std::pair<const Job*, int32_t>> tasks;  // (job, first strip)
  int64_t work = 0;
  const auto plan = [&](auto matrix_of) {
    tasks.clear();
    work = 0;
    for (const Job& job : jobs_) {
      const PackedMatrix& w = matrix_of(*job.ffn);
      for (int32_t strip = 0; strip < w.strips(); strip += kStripsPerTask) tasks.emplace_back(&job, strip);
      work += WorkOf(w, job.count);
    }
  };
  plan([](const FfnWeights& ffn) -> const PackedMatrix& { return ffn.gate; });
  pool_.Run(static_cast<int64_t>(tasks.size()), 2 * work, [&](int64_t i) {
    const auto& [job, strip] = tasks[static_cast<size_t>(i)];
    const PackedMatrix& gate = job->ffn->gate;
    const int32_t end = std::min(strip + kStripsPerTask, gate.strips());
    const auto count = static_cast<int32_t>(job->count);
    const float* const* in = rows_in_.data() + job->first;
    gemm_(gate, strip, end, in, gate_rows_.data() + job->first, count);
    gemm_(job->ffn->up, strip, end, in, up_rows_.data() + job->first, count);
    const int32_t row = strip * kStripRows;
    const int32_t rows = std::min(end * kStripRows, gate.rows) - row;
    for (size_t r = job->first; r < job->first + job->count; ++r) {
      kernels_.swiglu(gate_rows_[r] + row, up_rows_[r] + row, rows);
    }
  });
  plan([](const FfnWeights& ffn) -> const PackedMatrix& { return ffn.down; });
  pool_.Run(static_cast<int64_t>(tasks.size()), work, [&](int64_t i) {
    const auto& [job, strip] = tasks[static_cast<size_t>(i)];
    const PackedMatrix& down = job->ffn->down;
    gemm_(down, strip, std::min(strip + kStripsPerTask, down.strips()), gate_rows_.data() + job->first,
          out_rows_.data() + job->first, static_cast<int32_t>(job->count));
  });
}

// Routed experts in order of choice, then the shared expert: one order, whatever else is in the batch.
void FfnRunner::Combine(const LayerWeights& layer, std::span<float* const> out) {
  const auto hidden = static_cast<size_t>(config_.hidden_size);
  const auto top_k = static_cast<size_t>(config_.experts_per_token);
  const bool shared = layer.ffn.gate.rows > 0;
  pool_.Run(static_cast<int64_t>(out.size()), static_cast<int64_t>(out.size() * top_k * hidden),
            [&](int64_t row) {
              const auto t = static_cast<size_t>(row);
              for (size_t d = 0; d < hidden; ++d) {
                float sum = 0;
                for (size_t slot = 0; slot < top_k; ++slot) {
                  sum += expert_weights_[t * top_k + slot] * expert_out_[(t * top_k + slot) * hidden + d];
                }
                out[t][d] = shared ? sum + out[t][d] : sum;
              }
            });
}

}  // namespace millrace::engine
