// One step on the CPU: embedding, layers, head. Rows are tokens of the batch, in order.
#include "engine/backend/cpu/cpu_backend.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <thread>

#include "base/check.h"
#include "base/cpu.h"
#include "base/digest.h"
#include "engine/backend/cpu/attention.h"
#include "engine/backend/cpu/bfloat16.h"
#include "engine/backend/cpu/cpu_weights.h"
#include "engine/backend/cpu/expert_mover.h"
#include "engine/backend/cpu/moe_layer.h"
#include "engine/backend/cpu/packing.h"
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

class CpuBackend : public Backend {
 public:
  CpuBackend(std::shared_ptr<const CpuWeights> weights, const CpuBackendOptions& options,
             const KernelTable& kernels, const KvLayout& layout, HugeMemory kv)
      : weights_(std::move(weights)),
        config_(weights_->config()),
        options_(options),
        bf16_(weights_->precision_ == Precision::kBfloat16),
        format_(weights_->format_),
        kernels_(kernels),
        layout_(layout),
        kv_(std::move(kv)),
        pool_(options.num_threads),
        group_(options.group.group),
        mover_(group_ == nullptr
                   ? nullptr
                   : std::make_unique<ExpertMover>(weights_, options.group, options.num_threads)),
        rope_(config_),
        attention_(layout, config_.num_heads, kernels, pool_),
        ffn_(config_, kernels, format_, options.batch_tokens_max, pool_, group_),
        hidden_(FloatRows(options.batch_tokens_max, config_.hidden_size)),
        normed_(FloatRows(options.batch_tokens_max, config_.hidden_size)),
        qkv_(FloatRows(options.batch_tokens_max, config_.q_size() + 2 * config_.kv_size())),
        attended_(FloatRows(options.batch_tokens_max, config_.q_size())),
        mtp_input_(FloatRows(options.with_mtp ? options.batch_tokens_max : 0, 2 * config_.hidden_size)),
        quantized_(static_cast<size_t>(is_integer() ? options.batch_tokens_max : 0),
                   ActivationBytes(format_, std::max({config_.hidden_size, config_.q_size(),
                                                      options.with_mtp ? 2 * config_.hidden_size : 0}))),
        angles_(FloatRows(options.batch_tokens_max, 2 * rope_.pairs())),
        logits_(static_cast<size_t>(options.logit_rows_max) * static_cast<size_t>(config_.vocab_size)),
        mtp_logits_(options.with_mtp ? logits_.size() : 0),
        ones_(static_cast<size_t>(options.batch_tokens_max), 1.0f) {
    rows_.reserve(static_cast<size_t>(options.batch_tokens_max));
    runs_.reserve(static_cast<size_t>(options.batch_tokens_max));
  }

  const ModelConfig& config() const override { return config_; }
  const KvLayout& kv_layout() const override { return layout_; }
  std::span<std::byte> kv_memory() override { return kv_.bytes(); }
  std::string Describe() const override {
    const char* weights = format_ == WeightFormat::kInt8   ? ", int8 weights"
                          : format_ == WeightFormat::kInt4 ? ", int4 weights"
                                                           : "";
    const std::string rank =
        group_ == nullptr ? "" : fmt::format(", rank {} of {}", group_->rank(), group_->shape().num_ranks);
    return fmt::format("cpu, {}, {} threads, {}{}{}", kernels_.name, pool_.num_threads(),
                       bf16_ ? "bfloat16" : "float32", weights, rank);
  }
  void set_trace(RouterTrace trace) { trace_ = std::move(trace); }

  StatusOr<StepOutput> Forward(const Batch& batch, const LayerDone& layer_done) override {
    const bool mtp_rows =
        std::any_of(batch.segments.begin(), batch.segments.end(), [](const Segment& segment) {
          return std::any_of(segment.next_tokens.begin(), segment.next_tokens.end(),
                             [](int32_t token) { return token >= 0; });
        });
    while (true) {
      MR_ASSIGN_OR_RETURN(const GroupPass pass,
                          JoinPass(batch.segments.empty() ? PassKind::kIdle : PassKind::kStep, mtp_rows));
      if (pass.kind == PassKind::kIdle) return StepOutput{};
      CollectRows(batch);
      StatusOr<StepOutput> output = RunStep(layer_done, pass.mtp);
      // The group has lost a rank: the same again without it.
      if (output.ok() || !absl::IsAborted(output.status())) return output;
    }
  }

  StatusOr<std::span<const float>> ForwardMtp(std::span<const MtpSegment> segments) override {
    MR_CHECK(options_.with_mtp);
    while (true) {
      MR_RETURN_IF_ERROR(JoinPass(PassKind::kDraft, true).status());
      CollectMtpRows(segments);
      const Status status = RunMtp({});
      if (status.ok()) return Head(&mtp_logits_);
      if (!absl::IsAborted(status)) return status;
    }
  }

  void RunParallel(int64_t num_tasks, int64_t work, absl::FunctionRef<void(int64_t)> task) override {
    pool_.Run(num_tasks, work, [&](int64_t i, int) { task(i); });
  }

  bool JoinWanted() override { return group_ != nullptr && (mover_->has_changes() || group_->JoinWanted()); }
  void OnJoinWanted(const std::function<void()>& wake) override {
    if (group_ == nullptr) return;
    mover_->OnChanges(wake);
    group_->OnJoinWanted(wake);
  }

 private:
  // Takes part in the group's passes, without rows, until one of the wanted kind has begun, or, for kIdle,
  // once. A single process begins what it wants.
  StatusOr<GroupPass> JoinPass(PassKind wanted, bool mtp_rows) {
    if (group_ == nullptr) return GroupPass{wanted, options_.with_mtp && mtp_rows, true};
    TimePoint uncovered_since;
    while (true) {
      mover_->BeforePass();
      MR_ASSIGN_OR_RETURN(const GroupPass pass, group_->BeginPass(wanted, mtp_rows));
      mover_->PassBegun();
      if (!pass.covered) {
        const TimePoint now = Clock::System().Now();
        if (uncovered_since == TimePoint{}) uncovered_since = now;
        MR_RETURN_IF_ERROR(mover_->status());
        if (now - uncovered_since > options_.group.reload_max) {
          return Unavailable("experts of a lost rank are not back after {:.0f} s",
                             Seconds(options_.group.reload_max));
        }
        std::this_thread::sleep_for(std::chrono::microseconds(500));
        continue;
      }
      if (pass.kind == wanted) return pass;
      rows_.clear();
      if (const Status status = RunOthersPass(pass); !status.ok() && !absl::IsAborted(status)) return status;
      if (wanted == PassKind::kIdle) return GroupPass{};
    }
  }

  Status RunOthersPass(const GroupPass& pass) {
    if (pass.kind == PassKind::kStep) {
      for (int32_t l = config_.num_dense_layers; l < config_.num_layers; ++l) {
        MR_RETURN_IF_ERROR(RunFfn(weights_->layers[static_cast<size_t>(l)], l, {}));
      }
    }
    if (pass.kind == PassKind::kDraft || pass.mtp) {
      MR_RETURN_IF_ERROR(RunFfn(weights_->mtp.front().layer, config_.num_layers, {}));
    }
    return OkStatus();
  }

  StatusOr<StepOutput> RunStep(const LayerDone& layer_done, bool with_mtp) {
    for (size_t r = 0; r < rows_.size(); ++r) Embed(rows_[r].token, hidden_[r]);
    for (int32_t l = 0; l < config_.num_layers; ++l) {
      MR_RETURN_IF_ERROR(RunLayer(weights_->layers[static_cast<size_t>(l)], l, layer_done));
    }
    Norm(weights_->final_norm);
    StepOutput output;
    output.logits = Head(&logits_);
    if (options_.with_mtp) output.hidden = CopyHidden();
    KeepMtpRows();
    if (rows_.empty() && !with_mtp) return output;
    MR_RETURN_IF_ERROR(RunMtp(layer_done));
    output.mtp_logits = Head(&mtp_logits_);
    return output;
  }

  void CollectMtpRows(std::span<const MtpSegment> segments) {
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
  }

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
    PrepareRows();
  }

  // What depends on the list of rows.
  void PrepareRows() {
    runs_.clear();
    for (size_t r = 0; r < rows_.size(); ++r) {
      const Row& row = rows_[r];
      rope_.Angles(row.position, angles_[r], angles_[r] + rope_.pairs());
      // The MTP layer may leave rows out of the middle of a segment.
      if (runs_.empty() || runs_.back().segment != row.segment || rows_[r - 1].position + 1 != row.position) {
        runs_.push_back({row.segment, static_cast<int32_t>(r), 0, row.position});
      }
      ++runs_.back().num_rows;
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

  bool is_integer() const { return format_ == WeightFormat::kInt8 || format_ == WeightFormat::kInt4; }

  void Quantize(const float* x, int32_t width, size_t row) {
    auto* const values = reinterpret_cast<int8_t*>(quantized_[row]);
    const int32_t groups = (width + kGroupCols - 1) / kGroupCols;
    kernels_.quantize(x, width, values, reinterpret_cast<ActivationGroup*>(values + groups * kGroupCols));
  }

  // `x`, [rows_.size()] of `width`, as products want it.
  std::span<const void* const> Input(const Rows& x, int32_t width) {
    if (!is_integer()) return x.input(rows_.size());
    pool_.Run(static_cast<int64_t>(rows_.size()), static_cast<int64_t>(rows_.size()) * width,
              [&](int64_t r, int) { Quantize(x[static_cast<size_t>(r)], width, static_cast<size_t>(r)); });
    return quantized_.input(rows_.size());
  }

  // normed_ = RMSNorm(hidden_); returns it as products want it.
  std::span<const void* const> Norm(std::span<const float> weight) {
    pool_.Run(static_cast<int64_t>(rows_.size()), static_cast<int64_t>(rows_.size() * weight.size() * 4),
              [&](int64_t row, int) {
                const auto r = static_cast<size_t>(row);
                kernels_.rms_norm(hidden_[r], weight.data(), config_.hidden_size, config_.rms_norm_eps,
                                  normed_[r]);
                if (is_integer()) Quantize(normed_[r], config_.hidden_size, r);
              });
    return is_integer() ? quantized_.input(rows_.size()) : normed_.input(rows_.size());
  }

  Status RunLayer(const LayerWeights& layer, int32_t index, const LayerDone& layer_done) {
    const size_t rows = rows_.size();
    ParallelGemm(pool_, kernels_, layer.qkv, Norm(layer.input_norm), qkv_.first(rows));
    pool_.Run(static_cast<int64_t>(rows),
              static_cast<int64_t>(rows) * (config_.q_size() + 2 * config_.kv_size()) * 4,
              [&](int64_t r, int) { FinishQkv(layer, index, static_cast<size_t>(r)); });
    if (layer_done) layer_done(index);
    attention_.Run(runs_, index, kv_.bytes().data(), qkv_.first(rows), attended_.first(rows));
    // Products add to the residual stream themselves.
    ParallelGemm(pool_, kernels_, layer.dense, Input(attended_, config_.q_size()), hidden_.first(rows),
                 ones_.data());
    if (!layer.dense_bias.empty()) {
      for (size_t r = 0; r < rows; ++r) {
        for (size_t d = 0; d < layer.dense_bias.size(); ++d) hidden_[r][d] += layer.dense_bias[d];
      }
    }
    return RunFfn(layer, index, Norm(layer.post_norm));
  }

  // x: normed_ as products want it.
  Status RunFfn(const LayerWeights& layer, int32_t index, std::span<const void* const> x) {
    const size_t rows = rows_.size();
    FfnRunner::Trace trace;
    if (trace_) trace = [&](int32_t row, std::span<const int32_t> experts) { trace_(index, row, experts); };
    if (group_ != nullptr && layer.moe) {
      const int32_t moe_layer = index - config_.num_dense_layers;
      return ffn_.RunInGroup(layer, mover_->experts(moe_layer), moe_layer, normed_.input(rows), x,
                             hidden_.first(rows), trace);
    }
    ffn_.Run(layer, normed_.input(rows), x, hidden_.first(rows), trace);
    return OkStatus();
  }

  // Bias, QK norm and rotation of one row of qkv_; its K and V go to their page.
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
      if (!norm.empty()) kernels_.rms_norm(x, norm.data(), config_.head_dim, config_.rms_norm_eps, x);
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

  // Logits of the rows that want them, from normed_.
  std::span<const float> Head(std::vector<float>* logits) {
    const auto width = static_cast<size_t>(config_.vocab_size);
    head_in_.clear();
    head_out_.clear();
    for (size_t r = 0; r < rows_.size(); ++r) {
      if (!rows_[r].logits) continue;
      head_in_.push_back(is_integer() ? quantized_.input(rows_.size())[r] : normed_[r]);
      head_out_.push_back(logits->data() + head_out_.size() * width);
    }
    MR_CHECK(head_in_.size() <= static_cast<size_t>(options_.logit_rows_max), "{} rows of logits",
             head_in_.size());
    ParallelGemm(pool_, kernels_, weights_->head, head_in_, head_out_);
    return std::span(*logits).first(head_in_.size() * width);
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

  Status RunMtp(const LayerDone& layer_done) {
    const MtpWeights& mtp = weights_->mtp.front();
    const int32_t hidden = config_.hidden_size;
    PrepareRows();
    for (size_t r = 0; r < rows_.size(); ++r) {
      MR_CHECK(rows_[r].next_token < config_.vocab_size);
      float* const input = mtp_input_[r];
      Embed(rows_[r].next_token, hidden_[r]);
      kernels_.rms_norm(hidden_[r], mtp.embedding_norm.data(), hidden, config_.rms_norm_eps, input);
      kernels_.rms_norm(normed_[r], mtp.hidden_norm.data(), hidden, config_.rms_norm_eps, input + hidden);
    }
    ParallelGemm(pool_, kernels_, mtp.projection, Input(mtp_input_, 2 * hidden), hidden_.first(rows_.size()));
    MR_RETURN_IF_ERROR(RunLayer(mtp.layer, config_.num_layers, layer_done));
    Norm(mtp.final_norm);
    return OkStatus();
  }

  const std::shared_ptr<const CpuWeights> weights_;  // shared by the backends of this process
  const ModelConfig config_;
  const CpuBackendOptions options_;
  const bool bf16_;  // embedding and KV
  const WeightFormat format_;
  const KernelTable& kernels_;
  const KvLayout layout_;
  HugeMemory kv_;
  ThreadPool pool_;
  ExpertGroup* const group_;                  // null: a single process
  const std::unique_ptr<ExpertMover> mover_;  // in a group
  const Rope rope_;
  AttentionRunner attention_;
  FfnRunner ffn_;
  RouterTrace trace_;

  std::vector<Row> rows_;
  std::vector<Segment> mtp_segments_;  // what rows_ of ForwardMtp point to
  std::vector<float> hidden_out_;
  std::vector<AttentionRun> runs_;  // of rows_
  Rows hidden_;                     // the residual stream
  Rows normed_;
  Rows qkv_;
  Rows attended_;
  Rows mtp_input_;
  Rows quantized_;  // the current product's input, integer formats
  Rows angles_;     // cos then sin
  std::vector<float> logits_;
  std::vector<float> mtp_logits_;
  std::vector<float> ones_;
  std::vector<const void*> head_in_;
  std::vector<float*> head_out_;
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
      if (!cpu.avx512_vnni) return InvalidArgument("this processor has no AVX-512 (F, BW, VL, DQ, VNNI)");
      return &Avx512Kernels();
    case Isa::kAmx:
      if (!cpu.avx512_vnni || !cpu.amx_int8) return InvalidArgument("this processor has no AMX with int8");
      if (!AskForAmx()) return InvalidArgument("the operating system refuses AMX");
      return &AmxKernels();
    case Isa::kAuto:
      break;
  }
  return &BestKernels();
}

}  // namespace

const KernelTable& BestKernels() {
  const CpuFeatures& cpu = GetCpuFeatures();
  return cpu.avx512_vnni ? Avx512Kernels() : cpu.avx2_fma ? Avx2Kernels() : PortableKernels();
}

StatusOr<Isa> ParseIsa(const std::string& name) {
  if (name == "auto") return Isa::kAuto;
  if (name == "portable") return Isa::kPortable;
  if (name == "avx2") return Isa::kAvx2;
  if (name == "avx512") return Isa::kAvx512;
  if (name == "amx") return Isa::kAmx;
  return InvalidArgument("isa '{}' is not one of auto, portable, avx2, avx512, amx", name);
}

StatusOr<Precision> ParsePrecision(const std::string& name) {
  if (name == "bfloat16") return Precision::kBfloat16;
  if (name == "float32") return Precision::kFloat32;
  return InvalidArgument("precision '{}' is not one of bfloat16, float32", name);
}

StatusOr<Quantization> ParseQuantization(const std::string& name) {
  if (name == "none") return Quantization::kNone;
  if (name == "int8") return Quantization::kInt8;
  if (name == "int4") return Quantization::kInt4;
  return InvalidArgument("quantisation '{}' is not one of none, int8, int4", name);
}

StatusOr<std::unique_ptr<Backend>> MakeCpuBackend(std::shared_ptr<const Weights> weights,
                                                  const CpuBackendOptions& options) {
  auto cpu_weights = std::dynamic_pointer_cast<const CpuWeights>(std::move(weights));
  MR_CHECK(cpu_weights != nullptr, "weights of another backend");
  const ModelConfig& config = cpu_weights->config();
  if (options.num_pages < 1 || options.batch_tokens_max < 1 || options.logit_rows_max < 1) {
    return InvalidArgument("num_pages, batch_tokens_max and logit_rows_max must be at least 1");
  }
  if (config.num_heads / config.num_kv_heads > kAttentionQueries) {
    return Unimplemented("{} heads over {} kv heads: the CPU backend shares a kv head among at most {}",
                         config.num_heads, config.num_kv_heads, kAttentionQueries);
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

StatusOr<GroupShape> CpuGroupShape(const Weights& weights, const CpuBackendOptions& options,
                                   int32_t num_ranks, uint64_t model_digest) {
  const auto* const cpu = dynamic_cast<const CpuWeights*>(&weights);
  MR_CHECK(cpu != nullptr, "weights of another backend");
  MR_ASSIGN_OR_RETURN(const KernelTable* kernels, ChooseKernels(options.isa));
  const ModelConfig& config = cpu->config();
  GroupShape shape;
  shape.num_ranks = num_ranks;
  shape.num_layers = config.num_layers - config.num_dense_layers + static_cast<int32_t>(cpu->mtp.size());
  shape.num_experts = config.num_experts;
  shape.experts_per_token = config.experts_per_token;
  shape.hidden_size = config.hidden_size;
  shape.rows_max = options.batch_tokens_max;
  shape.row_bytes = ActivationBytes(cpu->format_, config.hidden_size);
  shape.digest =
      Xxh3(AsBytes(fmt::format("{}|{}|{}|{}|{}", model_digest, static_cast<int>(cpu->format_),
                               static_cast<int>(cpu->precision_), kernels->name, options.with_mtp)));
  return shape;
}

void SetRouterTrace(Backend& backend, RouterTrace trace) {
  auto* const cpu = dynamic_cast<CpuBackend*>(&backend);
  MR_CHECK(cpu != nullptr, "not a CPU backend");
  cpu->set_trace(std::move(trace));
}

}  // namespace millrace::engine
