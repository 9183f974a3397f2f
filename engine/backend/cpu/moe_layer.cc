#include "engine/backend/cpu/moe_layer.h"

#include <algorithm>

#include "base/check.h"
#include "engine/backend/cpu/packing.h"

namespace millrace::engine {
namespace {

constexpr int32_t kBlockCols = kGroupCols;  // inner columns of a unit: one group of down's input
constexpr int32_t kBlockStrips = 2 * kBlockCols / kStripRows;  // gate and up
constexpr int32_t kUnitRowsMax = 256;                          // hot experts are split beyond that
constexpr int32_t kUnitsPerThread = 8;  // at least, where the matrix has the strips for it

int64_t WorkOf(const PackedMatrix& w, size_t rows) {
  return int64_t{w.rows} * w.cols * static_cast<int64_t>(rows);
}

// Strips per unit: even, since kernels read pairs.
int32_t StripsPerUnit(int32_t strips, int threads) {
  return std::clamp(strips / (threads * kUnitsPerThread), 2, 16) / 2 * 2;
}

bool IsInteger(WeightFormat format) { return format == WeightFormat::kInt8 || format == WeightFormat::kInt4; }

int32_t BlocksOf(const FfnWeights& ffn) { return (ffn.width + kBlockCols - 1) / kBlockCols; }

}  // namespace

void ParallelGemm(ThreadPool& pool, const KernelTable& kernels, const PackedMatrix& w,
                  std::span<const void* const> x, std::span<float* const> y, const float* scale) {
  MR_CHECK(x.size() == y.size());
  if (x.empty()) return;
  const auto gemm = kernels.gemm[static_cast<size_t>(w.format)];
  const int32_t step = StripsPerUnit(w.strips, pool.num_threads());
  const int32_t units = (w.strips + step - 1) / step;
  pool.Run(units, WorkOf(w, x.size()), [&](int64_t unit, int) {
    GemmArgs args{};
    args.w = &w;
    args.strip_begin = static_cast<int32_t>(unit) * step;
    args.strip_end = std::min(args.strip_begin + step, w.strips);
    args.x = x.data();
    args.y = y.data();
    args.y_offset = int64_t{args.strip_begin} * kStripRows;
    args.scale = scale;
    args.tokens = static_cast<int32_t>(x.size());
    // Likely ours next: the other threads take those between.
    const int64_t next = unit + pool.num_threads();
    if (next < units) args.next = w.data + next * step * w.strip_bytes;
    gemm(args);
  });
}

FfnRunner::FfnRunner(const ModelConfig& config, const KernelTable& kernels, WeightFormat format,
                     int32_t rows_max, ThreadPool& pool, ExpertGroup* group)
    : config_(config),
      shape_(MakeRouterShape(config)),
      kernels_(kernels),
      format_(format),
      pool_(pool),
      router_logits_(FloatRows(rows_max, config.num_experts)),
      inner_([&] {
        const auto rows = static_cast<size_t>(rows_max);
        // All rows of all ranks may choose this rank's experts.
        const size_t ranks = group == nullptr ? 1 : static_cast<size_t>(group->shape().num_ranks);
        const size_t moe = static_cast<size_t>(config.experts_per_token) * ranks *
                               ActivationBytes(format, config.moe_intermediate_size) +
                           ActivationBytes(format, config.shared_intermediate_size);
        return rows * std::max(moe, ActivationBytes(format, config.intermediate_size));
      }()),
      group_(group),
      shared_(FloatRows(group == nullptr || config.shared_intermediate_size == 0 ? 0 : rows_max,
                        config.hidden_size)) {
  const auto rows = static_cast<size_t>(rows_max);
  const size_t slots = rows * static_cast<size_t>(config.experts_per_token);
  if (group != nullptr) {
    products_.resize(slots);
    order_.resize(slots);
  }
  expert_ids_.resize(slots);
  expert_weights_.resize(slots);
  router_scratch_.assign(static_cast<size_t>(pool.num_threads()),
                         std::vector<float>(2 * static_cast<size_t>(config.num_experts) +
                                            static_cast<size_t>(config.num_groups)));
  expert_begin_.resize(static_cast<size_t>(config.num_experts) + 1);
  expert_next_.resize(static_cast<size_t>(config.num_experts));
  in_rows_.reserve(slots + rows);
  inner_rows_.reserve(slots + rows);
  out_rows_.reserve(slots + rows);
  row_scales_.reserve(slots + rows);
  for (int t = 0; t < pool.num_threads(); ++t) gate_up_.push_back(FloatRows(kUnitRowsMax, 2 * kBlockCols));
  jobs_.reserve(static_cast<size_t>(config.num_experts) + 1);
}

void FfnRunner::Run(const LayerWeights& layer, std::span<const void* const> normed,
                    std::span<const void* const> x, std::span<float* const> residual, const Trace& trace) {
  if (x.empty()) return;
  ClearJobs();
  if (layer.moe) {
    Route(layer, normed, trace);
    GroupByExpert(layer, x, residual);
  }
  if (layer.ffn.width > 0) AddJob(layer.ffn, x, residual);
  RunJobs();
}

void FfnRunner::ClearJobs() {
  jobs_.clear();
  in_rows_.clear();
  inner_rows_.clear();
  out_rows_.clear();
  row_scales_.clear();
  inner_used_ = 0;
}

void FfnRunner::Route(const LayerWeights& layer, std::span<const void* const> normed, const Trace& trace) {
  const auto experts = static_cast<size_t>(config_.num_experts);
  const auto top_k = static_cast<size_t>(config_.experts_per_token);
  ParallelGemm(pool_, kernels_, layer.router, normed, router_logits_.first(normed.size()));
  pool_.Run(static_cast<int64_t>(normed.size()), static_cast<int64_t>(normed.size() * experts * top_k * 4),
            [&](int64_t row, int thread) {
              const auto t = static_cast<size_t>(row);
              RouteToken(shape_, {router_logits_[t], experts}, layer.expert_bias,
                         router_scratch_[static_cast<size_t>(thread)],
                         std::span(expert_ids_).subspan(t * top_k, top_k),
                         std::span(expert_weights_).subspan(t * top_k, top_k));
            });
  if (!trace) return;
  for (size_t t = 0; t < normed.size(); ++t) {
    trace(static_cast<int32_t>(t), std::span(expert_ids_).subspan(t * top_k, top_k));
  }
}

// Counting sort of (row, slot) by expert.
void FfnRunner::GroupByExpert(const LayerWeights& layer, std::span<const void* const> x,
                              std::span<float* const> residual) {
  const auto top_k = static_cast<size_t>(config_.experts_per_token);
  const size_t slots = x.size() * top_k;
  std::fill(expert_begin_.begin(), expert_begin_.end(), 0);
  for (size_t s = 0; s < slots; ++s) ++expert_begin_[static_cast<size_t>(expert_ids_[s]) + 1];
  for (size_t e = 0; e < layer.experts.size(); ++e) {
    expert_begin_[e + 1] += expert_begin_[e];
    expert_next_[e] = expert_begin_[e];
  }
  const size_t inner_bytes = ActivationBytes(format_, config_.moe_intermediate_size);
  in_rows_.resize(slots);
  inner_rows_.resize(slots);
  out_rows_.resize(slots);
  row_scales_.resize(slots);
  for (size_t s = 0; s < slots; ++s) {
    const auto place = static_cast<size_t>(expert_next_[static_cast<size_t>(expert_ids_[s])]++);
    in_rows_[place] = x[s / top_k];
    inner_rows_[place] = inner_.data() + place * inner_bytes;
    out_rows_[place] = residual[s / top_k];
    row_scales_[place] = expert_weights_[s];
  }
  inner_used_ = slots * inner_bytes;
  for (size_t e = 0; e < layer.experts.size(); ++e) {
    const int32_t count = expert_begin_[e + 1] - expert_begin_[e];
    if (count > 0) jobs_.push_back({&layer.experts[e], expert_begin_[e], count});
  }
}

void FfnRunner::AddJob(const FfnWeights& ffn, std::span<const void* const> x,
                       std::span<float* const> residual) {
  const size_t inner_bytes = ActivationBytes(format_, ffn.width);
  jobs_.push_back({&ffn, static_cast<int32_t>(in_rows_.size()), static_cast<int32_t>(x.size())});
  for (size_t t = 0; t < x.size(); ++t) AddRow(x[t], residual[t], 1.0f, inner_bytes);
}

void FfnRunner::AddRow(const void* x, float* out, std::optional<float> scale, size_t inner_bytes) {
  MR_CHECK(inner_used_ + inner_bytes <= inner_.size());
  in_rows_.push_back(x);
  inner_rows_.push_back(inner_.data() + inner_used_);
  out_rows_.push_back(out);
  if (scale.has_value()) row_scales_.push_back(*scale);
  inner_used_ += inner_bytes;
}

void FfnRunner::RunJobs() {
  units_.clear();
  int64_t work = 0;
  for (size_t j = 0; j < jobs_.size(); ++j) {
    const Job& job = jobs_[j];
    for (int32_t first = 0; first < job.count; first += kUnitRowsMax) {
      for (int32_t block = 0; block < BlocksOf(*job.ffn); ++block) {
        units_.push_back(
            {static_cast<int32_t>(j), block, job.first + first, std::min(kUnitRowsMax, job.count - first)});
      }
    }
    work += WorkOf(job.ffn->gate_up, static_cast<size_t>(job.count));
  }
  const auto num_units = static_cast<int64_t>(units_.size());
  pool_.Run(num_units, work, [&](int64_t i, int thread) {
    const int64_t likely_next = i + pool_.num_threads();
    const char* next = nullptr;
    if (likely_next < num_units) {
      const Unit& unit = units_[static_cast<size_t>(likely_next)];
      const PackedMatrix& w = jobs_[static_cast<size_t>(unit.job)].ffn->gate_up;
      next = w.data + int64_t{unit.block} * kBlockStrips * w.strip_bytes;
    }
    GateUp(units_[static_cast<size_t>(i)], next, thread);
  });

  const PackedMatrix& down = jobs_.front().ffn->down;
  const int32_t step = StripsPerUnit(down.strips, pool_.num_threads());
  const int32_t units = (down.strips + step - 1) / step;
  pool_.Run(units, work / 2, [&](int64_t unit, int) {
    const int64_t likely_next = unit + pool_.num_threads();
    const char* next = likely_next < units ? down.data + likely_next * step * down.strip_bytes : nullptr;
    const auto begin = static_cast<int32_t>(unit) * step;
    Down(begin, std::min(begin + step, down.strips), next);
  });
}

void FfnRunner::GateUp(const Unit& unit, const char* next, int thread) {
  const FfnWeights& ffn = *jobs_[static_cast<size_t>(unit.job)].ffn;
  const Rows& sums = gate_up_[static_cast<size_t>(thread)];
  GemmArgs args{};
  args.w = &ffn.gate_up;
  args.strip_begin = unit.block * kBlockStrips;
  args.strip_end = std::min(args.strip_begin + kBlockStrips, ffn.gate_up.strips);
  args.x = in_rows_.data() + unit.first;
  args.y = sums.first(static_cast<size_t>(unit.count)).data();
  args.tokens = unit.count;
  args.next = next;
  kernels_.gemm[static_cast<size_t>(format_)](args);
  const int32_t cols = (args.strip_end - args.strip_begin) / 2 * kStripRows;
  for (int32_t r = 0; r < unit.count; ++r) {
    const float* const gate_up = sums[static_cast<size_t>(r)];
    void* const inner = inner_rows_[static_cast<size_t>(unit.first + r)];
    if (!IsInteger(format_)) {
      kernels_.swiglu(gate_up, cols, static_cast<float*>(inner) + int64_t{unit.block} * kBlockCols);
      continue;
    }
    float values[kBlockCols];
    kernels_.swiglu(gate_up, cols, values);
    auto* const row = static_cast<int8_t*>(inner);
    auto* const groups = reinterpret_cast<ActivationGroup*>(row + int64_t{ffn.down.groups} * kGroupCols);
    kernels_.quantize(values, cols, row + int64_t{unit.block} * kBlockCols, groups + unit.block);
  }
}

void FfnRunner::Down(int32_t strip_begin, int32_t strip_end, const char* next) {
  for (size_t j = 0; j < jobs_.size(); ++j) {
    const Job& job = jobs_[j];
    GemmArgs args{};
    args.w = &job.ffn->down;
    args.strip_begin = strip_begin;
    args.strip_end = strip_end;
    args.x = inner_rows_.data() + job.first;
    args.y = out_rows_.data() + job.first;
    args.y_offset = int64_t{strip_begin} * kStripRows;
    args.scale = row_scales_.empty() ? nullptr : row_scales_.data() + job.first;
    args.tokens = job.count;
    if (j + 1 < jobs_.size()) {
      const PackedMatrix& following = jobs_[j + 1].ffn->down;
      args.next = following.data + int64_t{strip_begin} * following.strip_bytes;
    } else {
      args.next = next;
    }
    kernels_.gemm[static_cast<size_t>(format_)](args);
  }
}

}  // namespace millrace::engine
