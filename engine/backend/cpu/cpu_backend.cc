// One step on the CPU: embedding, layers, head. Rows are tokens of the batch, in order.
#include "engine/backend/cpu/cpu_backend.h"

#include <cmath>
#include <cstring>

#include "base/check.h"
#include "base/cpu.h"
#include "engine/backend/cpu/bfloat16.h"
#include "engine/backend/cpu/cpu_weights.h"
#include "engine/backend/cpu/moe_layer.h"
#include "engine/backend/cpu/rope.h"

namespace millrace::engine {
namespace {

// A token of the step.
struct Row {
  const Segment* segment = nullptr;
  int32_t token = 0;
  int32_t next_token = 0;  // for the MTP layer
  int32_t position = 0;
  bool logits = false;
};

// A [rows, width] fp32 buffer with its row pointers.
class RowBuffer {
 public:
  RowBuffer(int32_t rows, int32_t width) : values_(static_cast<size_t>(rows) * static_cast<size_t>(width)) {
    for (int32_t r = 0; r < rows; ++r)
      rows_.push_back(values_.data() + static_cast<size_t>(r) * static_cast<size_t>(width));
  }
  float* operator[](size_t row) const { return rows_[row]; }
  std::span<float* const> first(size_t rows) const { return {rows_.data(), rows}; }
  std::span<const float* const> input(size_t rows) const {
    return {const_cast<const float* const*>(rows_.data()), rows};
  }
  const float* data() const { return values_.data(); }

 private:
  std::vector<float> values_;
  std::vector<float*> rows_;
};

// Statistics in double, in one order: the same on every instruction set.
void RmsNorm(const float* x, std::span<const float> weight, float eps, float* out) {
  double sum = 0;
  for (size_t i = 0; i < weight.size(); ++i) sum += double{x[i]} * x[i];
  const auto scale =
      static_cast<float>(1.0 / std::sqrt(sum / static_cast<double>(weight.size()) + double{eps}));
  for (size_t i = 0; i < weight.size(); ++i) out[i] = x[i] * scale * weight[i];
}

class CpuBackend : public Backend {
 public:
  CpuBackend(std::shared_ptr<const CpuWeights> weights, const CpuBackendOptions& options,
             const KernelTable& kernels, const KvLayout& layout, HugeMemory kv)
      : weights_(std::move(weights)),
        config_(weights_->config()),
        options_(options),
        bf16_(weights_->precision_ == Precision::kBfloat16),
        kernels_(kernels),
        gemm_(bf16_ ? kernels.gemm_bf16 : kernels.gemm_f32),
        layout_(layout),
        kv_(std::move(kv)),
        pool_(options.num_threads),
        rope_(config_),
        ffn_(config_, kernels, bf16_, options.batch_tokens_max, pool_),
        hidden_(options.batch_tokens_max, config_.hidden_size),
        normed_(options.batch_tokens_max, config_.hidden_size),
        delta_(options.batch_tokens_max, config_.hidden_size),
        qkv_(options.batch_tokens_max, config_.q_size() + 2 * config_.kv_size()),
        attended_(options.batch_tokens_max, config_.q_size()),
        mtp_input_(options.with_mtp ? options.batch_tokens_max : 0, 2 * config_.hidden_size),
        angles_(options.batch_tokens_max, 2 * rope_.pairs()),
        logits_(options.logit_rows_max, config_.vocab_size),
        mtp_logits_(options.with_mtp ? options.logit_rows_max : 0, config_.vocab_size) {}

  const ModelConfig& config() const override { return config_; }
  const KvLayout& kv_layout() const override { return layout_; }
  std::span<std::byte> kv_memory() override { return kv_.bytes(); }
  std::string Describe() const override {
    return fmt::format("cpu, {}, {} threads, {}", kernels_.name, pool_.num_threads(),
                       bf16_ ? "bfloat16" : "float32");
  }
  void set_trace(RouterTrace trace) { trace_ = std::move(trace); }

  StatusOr<StepOutput> Forward(const Batch& batch, const LayerDone& layer_done) override {
    CollectRows(batch);
    for (size_t r = 0; r < rows_.size(); ++r) Embed(rows_[r].token, hidden_[r]);
    for (int32_t l = 0; l < config_.num_layers; ++l)
      RunLayer(weights_->layers[static_cast<size_t>(l)], l, layer_done);
    Norm(weights_->final_norm);
    StepOutput output;
    const size_t count = Head(logits_);
    output.logits = {logits_.data(), count * static_cast<size_t>(config_.vocab_size)};
    if (options_.with_mtp) output.hidden = CopyHidden();
    KeepMtpRows();
    if (rows_.empty()) return output;
    RunMtp(layer_done);
    const size_t mtp_count = Head(mtp_logits_);
    output.mtp_logits = {mtp_logits_.data(), mtp_count * static_cast<size_t>(config_.vocab_size)};
    return output;
  }

  StatusOr<std::span<const float>> ForwardMtp(std::span<const MtpSegment> segments) override {
    MR_CHECK(options_.with_mtp);
    const auto width = static_cast<size_t>(config_.hidden_size);
    rows_.clear();
    mtp_segments_.clear();
    mtp_segments_.reserve(segments.size());
    for (const MtpSegment& segment : segments) {
      const auto count = static_cast<int32_t>(segment.next_tokens.size());
      MR_CHECK(count > 0 && segment.hidden.size() == segment.next_tokens.size() * width);
      MR_CHECK(rows_.size() + segment.next_tokens.size() <= static_cast<size_t>(options_.batch_tokens_max));
      Segment& run = mtp_segments_.emplace_back();
      run.tokens = segment.next_tokens;
      run.position = segment.position;
      run.pages = segment.pages;
      for (int32_t i = 0; i < count; ++i) {
        std::memcpy(normed_[rows_.size()], segment.hidden.data() + static_cast<size_t>(i) * width,
                    width * sizeof(float));
        Row row;
        row.segment = &run;
        row.next_token = segment.next_tokens[static_cast<size_t>(i)];
        MR_CHECK(row.next_token >= 0);
        row.position = segment.position + i;
        row.logits = i + 1 == count;
        rows_.push_back(row);
      }
    }
    RunMtp({});
    const size_t count = Head(mtp_logits_);
    return std::span<const float>(mtp_logits_.data(), count * static_cast<size_t>(config_.vocab_size));
  }

 private:
  // The final hidden states of the rows with logits.
  std::span<const float> CopyHidden() {
    hidden_out_.clear();
    for (size_t r = 0; r < rows_.size(); ++r) {
      if (rows_[r].logits)
        hidden_out_.insert(hidden_out_.end(), normed_[r], normed_[r] + config_.hidden_size);
    }
    return hidden_out_;
  }

  void CollectRows(const Batch& batch) {
    rows_.clear();
    for (const Segment& segment : batch.segments) {
      const auto count = static_cast<int32_t>(segment.tokens.size());
      MR_CHECK(count > 0 && segment.position >= 0 && segment.num_logits <= count);
      MR_CHECK(static_cast<int32_t>(segment.pages.size()) >= PagesFor(segment.position + count),
               "page table too short");
      MR_CHECK(segment.next_tokens.empty() ||
               (options_.with_mtp && segment.next_tokens.size() == segment.tokens.size()));
      for (int32_t i = 0; i < count; ++i) {
        Row row;
        row.segment = &segment;
        row.token = segment.tokens[static_cast<size_t>(i)];
        MR_CHECK(row.token >= 0 && row.token < config_.vocab_size, "token {}", row.token);
        row.next_token = segment.next_tokens.empty() ? -1 : segment.next_tokens[static_cast<size_t>(i)];
        row.position = segment.position + i;
        row.logits = i >= count - segment.num_logits;
        rows_.push_back(row);
      }
    }
    MR_CHECK(rows_.size() <= static_cast<size_t>(options_.batch_tokens_max), "{} tokens in one step",
             rows_.size());
    ComputeAngles();
  }

  void ComputeAngles() {
    for (size_t r = 0; r < rows_.size(); ++r) {
      rope_.Angles(rows_[r].position, angles_[r], angles_[r] + rope_.pairs());
    }
  }

  void Embed(int32_t token, float* out) const {
    const auto hidden = static_cast<size_t>(config_.hidden_size);
    const size_t offset = static_cast<size_t>(token) * hidden;
    if (!bf16_) {
      std::memcpy(out, static_cast<const float*>(weights_->embedding) + offset, hidden * sizeof(float));
      return;
    }
    const auto* narrow = static_cast<const uint16_t*>(weights_->embedding) + offset;
    for (size_t d = 0; d < hidden; ++d) out[d] = FromBf16(narrow[d]);
  }

  // normed_ = RMSNorm(hidden_)
  void Norm(std::span<const float> weight) {
    pool_.Run(static_cast<int64_t>(rows_.size()), static_cast<int64_t>(rows_.size() * weight.size() * 4),
              [&](int64_t r) {
                RmsNorm(hidden_[static_cast<size_t>(r)], weight, config_.rms_norm_eps,
                        normed_[static_cast<size_t>(r)]);
              });
  }

  void AddToHidden(const RowBuffer& delta, std::span<const float> bias) {
    for (size_t r = 0; r < rows_.size(); ++r) {
      for (size_t d = 0; d < static_cast<size_t>(config_.hidden_size); ++d) {
        hidden_[r][d] += bias.empty() ? delta[r][d] : delta[r][d] + bias[d];
      }
    }
  }

  void RunLayer(const LayerWeights& layer, int32_t index, const LayerDone& layer_done) {
    const size_t rows = rows_.size();
    Norm(layer.input_norm);
    ParallelGemm(pool_, gemm_, layer.qkv, normed_.input(rows), qkv_.first(rows));
    pool_.Run(static_cast<int64_t>(rows),
              static_cast<int64_t>(rows) * (config_.q_size() + 2 * config_.kv_size()) * 4,
              [&](int64_t r) { FinishQkv(layer, index, static_cast<size_t>(r)); });
    if (layer_done) layer_done(index);
    Attend(index);
    ParallelGemm(pool_, gemm_, layer.dense, attended_.input(rows), delta_.first(rows));
    AddToHidden(delta_, layer.dense_bias);
    Norm(layer.post_norm);
    FfnRunner::Trace trace;
    if (trace_) trace = [&](int32_t row, std::span<const int32_t> experts) { trace_(index, row, experts); };
    ffn_.Run(layer, normed_.input(rows), delta_.first(rows), trace);
    AddToHidden(delta_, {});
  }

  // Bias, QK norm and rotation of one row; its K and V go to their page.
  void FinishQkv(const LayerWeights& layer, int32_t index, size_t r) {
    float* const q = qkv_[r];
    float* const k = q + config_.q_size();
    float* const v = k + config_.kv_size();
    for (size_t i = 0; i < layer.qkv_bias.size(); ++i) q[i] += layer.qkv_bias[i];
    const float* const cos = angles_[r];
    const float* const sin = cos + rope_.pairs();
    // Q and K heads lie side by side.
    for (int32_t head = 0; head < config_.num_heads + config_.num_kv_heads; ++head) {
      float* const x = q + head * config_.head_dim;
      const auto& norm = head < config_.num_heads ? layer.query_norm : layer.key_norm;
      if (!norm.empty()) RmsNorm(x, norm, config_.rms_norm_eps, x);
      rope_.Apply(cos, sin, x);
    }
    const float scale = 1.0f / std::sqrt(static_cast<float>(config_.head_dim));
    for (int32_t i = 0; i < config_.q_size(); ++i) q[i] *= scale;
    const Row& row = rows_[r];
    std::byte* const piece = Piece(row, index, row.position / kPageTokens);
    for (int32_t head = 0; head < config_.num_kv_heads; ++head) {
      StoreKv(k + head * config_.head_dim, piece + layout_.row_offset(0, head, row.position % kPageTokens));
      StoreKv(v + head * config_.head_dim, piece + layout_.row_offset(1, head, row.position % kPageTokens));
    }
  }

  std::byte* Piece(const Row& row, int32_t layer, int32_t page) {
    return kv_.bytes().data() + layout_.piece_offset(layer, row.segment->pages[static_cast<size_t>(page)]);
  }

  void StoreKv(const float* values, std::byte* out) const {
    const auto count = static_cast<size_t>(config_.head_dim);
    if (!bf16_) {
      std::memcpy(out, values, count * sizeof(float));
      return;
    }
    auto* const narrow = reinterpret_cast<uint16_t*>(out);
    for (size_t i = 0; i < count; ++i) narrow[i] = ToBf16(values[i]);
  }

  void Attend(int32_t layer) {
    // Page tables as pointers, once per segment and layer.
    page_pointers_.clear();
    first_page_.clear();
    int64_t work = 0;
    const Segment* previous = nullptr;
    size_t begin = 0;
    for (const Row& row : rows_) {
      if (row.segment != previous) {
        previous = row.segment;
        begin = page_pointers_.size();
        const int32_t pages =
            PagesFor(row.segment->position + static_cast<int64_t>(row.segment->tokens.size()));
        for (int32_t p = 0; p < pages; ++p)
          page_pointers_.push_back(reinterpret_cast<const char*>(Piece(row, layer, p)));
      }
      first_page_.push_back(begin);
      work += int64_t{row.position + 1} * config_.q_size() * 2;
    }
    const int32_t group = config_.num_heads / config_.num_kv_heads;
    const auto attend = bf16_ ? kernels_.attend_bf16 : kernels_.attend_f32;
    pool_.Run(static_cast<int64_t>(rows_.size()) * config_.num_heads, work, [&](int64_t task) {
      const auto r = static_cast<size_t>(task / config_.num_heads);
      const auto head = static_cast<int32_t>(task % config_.num_heads);
      AttentionArgs args;
      args.query = qkv_[r] + head * config_.head_dim;
      args.pages = page_pointers_.data() + first_page_[r];
      args.key_offset = static_cast<int64_t>(layout_.row_offset(0, head / group, 0));
      args.value_offset = static_cast<int64_t>(layout_.row_offset(1, head / group, 0));
      args.head_dim = config_.head_dim;
      args.num_keys = rows_[r].position + 1;
      args.output = attended_[r] + head * config_.head_dim;
      attend(args);
    });
  }

  // Logits of the rows that want them, from normed_. Returns how many.
  size_t Head(const RowBuffer& logits) {
    std::vector<const float*> inputs;
    for (size_t r = 0; r < rows_.size(); ++r) {
      if (rows_[r].logits) inputs.push_back(normed_[r]);
    }
    MR_CHECK(inputs.size() <= static_cast<size_t>(options_.logit_rows_max), "{} rows of logits",
             inputs.size());
    ParallelGemm(pool_, gemm_, weights_->head, inputs, logits.first(inputs.size()));
    return inputs.size();
  }

  // Drops the rows that the MTP layer leaves alone; normed_ keeps the final hidden states of the others.
  void KeepMtpRows() {
    size_t kept = 0;
    for (size_t r = 0; r < rows_.size(); ++r) {
      if (rows_[r].next_token < 0) continue;
      if (kept != r)
        std::memcpy(normed_[kept], normed_[r], static_cast<size_t>(config_.hidden_size) * sizeof(float));
      rows_[kept++] = rows_[r];
    }
    rows_.resize(kept);
  }

  void RunMtp(const LayerDone& layer_done) {
    const MtpWeights& mtp = weights_->mtp.front();
    const size_t rows = rows_.size();
    ComputeAngles();
    for (size_t r = 0; r < rows; ++r) {
      MR_CHECK(rows_[r].next_token < config_.vocab_size);
      float* const input = mtp_input_[r];
      Embed(rows_[r].next_token, delta_[r]);
      RmsNorm(delta_[r], mtp.embedding_norm, config_.rms_norm_eps, input);
      RmsNorm(normed_[r], mtp.hidden_norm, config_.rms_norm_eps, input + config_.hidden_size);
    }
    ParallelGemm(pool_, gemm_, mtp.projection, mtp_input_.input(rows), hidden_.first(rows));
    RunLayer(mtp.layer, config_.num_layers, layer_done);
    Norm(mtp.final_norm);
  }

  const std::shared_ptr<const CpuWeights> weights_;  // shared by the backends of this process
  const ModelConfig config_;
  const CpuBackendOptions options_;
  const bool bf16_;
  const KernelTable& kernels_;
  const GemmKernel gemm_;
  const KvLayout layout_;
  HugeMemory kv_;
  ThreadPool pool_;
  const Rope rope_;
  FfnRunner ffn_;
  RouterTrace trace_;

  std::vector<Row> rows_;
  std::vector<Segment> mtp_segments_;  // what rows_ of ForwardMtp point to
  std::vector<float> hidden_out_;
  RowBuffer hidden_;  // the residual stream
  RowBuffer normed_;
  RowBuffer delta_;
  RowBuffer qkv_;
  RowBuffer attended_;
  RowBuffer mtp_input_;
  RowBuffer angles_;  // cos then sin
  RowBuffer logits_;
  RowBuffer mtp_logits_;
  std::vector<const char*> page_pointers_;
  std::vector<size_t> first_page_;  // per row, into page_pointers_
};

StatusOr<const KernelTable*> ChooseKernels(Isa isa) {
  const CpuFeatures& cpu = GetCpuFeatures();
  switch (isa) {
    case Isa::kPortable:
      return &PortableKernels();
    case Isa::kAvx2:
      if (!cpu.avx2_fma) return InvalidArgument("this processor has no AVX2 with FMA");
      return &Avx2Kernels();
    case Isa::kAvx512:
      if (!cpu.avx512) return InvalidArgument("this processor has no AVX-512 (F, BW, VL, DQ)");
      return &Avx512Kernels();
    case Isa::kAuto:
      break;
  }
  return cpu.avx512 ? &Avx512Kernels() : cpu.avx2_fma ? &Avx2Kernels() : &PortableKernels();
}

}  // namespace

StatusOr<Isa> ParseIsa(const std::string& name) {
  if (name == "auto") return Isa::kAuto;
  if (name == "portable") return Isa::kPortable;
  if (name == "avx2") return Isa::kAvx2;
  if (name == "avx512") return Isa::kAvx512;
  return InvalidArgument("isa '{}' is not one of auto, portable, avx2, avx512", name);
}

StatusOr<Precision> ParsePrecision(const std::string& name) {
  if (name == "bfloat16") return Precision::kBfloat16;
  if (name == "float32") return Precision::kFloat32;
  return InvalidArgument("precision '{}' is not one of bfloat16, float32", name);
}

StatusOr<std::unique_ptr<Backend>> MakeCpuBackend(std::shared_ptr<const Weights> weights,
                                                  const CpuBackendOptions& options) {
  auto cpu_weights = std::dynamic_pointer_cast<const CpuWeights>(std::move(weights));
  MR_CHECK(cpu_weights != nullptr, "weights of another backend");
  const ModelConfig& config = cpu_weights->config();
  if (options.num_pages < 1 || options.batch_tokens_max < 1 || options.logit_rows_max < 1) {
    return InvalidArgument("num_pages, batch_tokens_max and logit_rows_max must be at least 1");
  }
  CpuBackendOptions effective = options;
  if (effective.num_threads <= 0) effective.num_threads = UsableCpuCount();
  effective.with_mtp = options.with_mtp && config.num_mtp_layers > 0;
  MR_ASSIGN_OR_RETURN(const KernelTable* kernels, ChooseKernels(options.isa));
  KvLayout layout;
  layout.num_layers = config.num_layers + (effective.with_mtp ? config.num_mtp_layers : 0);
  layout.num_pages = options.num_pages;
  layout.num_kv_heads = config.num_kv_heads;
  layout.head_dim = config.head_dim;
  layout.dtype = cpu_weights->precision_ == Precision::kBfloat16 ? KvDType::kBf16 : KvDType::kF32;
  MR_ASSIGN_OR_RETURN(HugeMemory kv, HugeMemory::Allocate(layout.total_bytes(), "KV pages"));
  return std::unique_ptr<Backend>(
      std::make_unique<CpuBackend>(std::move(cpu_weights), effective, *kernels, layout, std::move(kv)));
}

void SetRouterTrace(Backend& backend, RouterTrace trace) {
  auto* const cpu = dynamic_cast<CpuBackend*>(&backend);
  MR_CHECK(cpu != nullptr, "not a CPU backend");
  cpu->set_trace(std::move(trace));
}

}  // namespace millrace::engine
