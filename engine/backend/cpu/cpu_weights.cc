#include "engine/backend/cpu/cpu_weights.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <optional>

#include "base/check.h"
#include "engine/backend/cpu/bfloat16.h"
#include "engine/backend/cpu/load_jobs.h"
#include "engine/backend/cpu/packing.h"
#include "engine/backend/cpu/weight_cache.h"

namespace millrace::engine {
namespace {

WeightFormat FormatOf(const CpuWeightsOptions& options) {
  switch (options.quantization) {
    case Quantization::kInt8:
      return WeightFormat::kInt8;
    case Quantization::kInt4:
      return WeightFormat::kInt4;
    case Quantization::kNone:
      break;
  }
  return options.precision == Precision::kBfloat16 ? WeightFormat::kBf16 : WeightFormat::kF32;
}

constexpr int64_t kRowsPerJob = 512;  // a multiple of kStripRows: what is expanded to fp32 at a time

// Rows of one tensor to be read, converted and packed into their place.
struct PackJob {
  std::string tensor;
  int64_t first_row = 0;
  int64_t rows = 0;
  int32_t cols = 0;
  std::byte* destination = nullptr;  // of the whole matrix
  // What it is packed as; absent for the embedding, which stays row by row.
  std::optional<PackedMatrix> matrix;
  int32_t strip_step = 1;
  int32_t strip_first = 0;
  bool bf16 = false;                                                 // the embedding's element
  const std::vector<float>* column_scale = nullptr;                  // norm_head
  size_t bytes() const { return static_cast<size_t>(rows * cols); }  // a measure of work
};

void PackEmbedding(const PackJob& job, std::span<const float> values) {
  const auto first = static_cast<size_t>(job.first_row * job.cols);
  if (!job.bf16) {
    std::memcpy(job.destination + first * 4, values.data(), values.size_bytes());
    return;
  }
  auto* const narrow = reinterpret_cast<uint16_t*>(job.destination) + first;
  for (size_t i = 0; i < values.size(); ++i) narrow[i] = ToBf16(values[i]);
}

// `scratch` is the thread's own.
Status RunJob(const TensorSource& source, const PackJob& job, std::vector<float>* scratch) {
  scratch->resize(std::max(scratch->size(), static_cast<size_t>(job.rows * job.cols)));
  const std::span<float> values = std::span(*scratch).first(static_cast<size_t>(job.rows * job.cols));
  MR_RETURN_IF_ERROR(source.ReadRows(job.tensor, job.first_row, job.rows, values));
  source.Forget(job.tensor, job.first_row, job.rows);
  if (job.column_scale != nullptr) {
    for (size_t i = 0; i < values.size(); ++i)
      values[i] *= (*job.column_scale)[i % static_cast<size_t>(job.cols)];
  }
  if (!job.matrix) {
    PackEmbedding(job, values);
  } else {
    PackRows(BestKernels(), *job.matrix, job.destination, job.first_row, values, job.strip_step,
             job.strip_first);
  }
  return OkStatus();
}

// Lays matrices out one after another. Run twice: first without memory, to learn the size.
class Planner {
 public:
  Planner(const TensorSource& source, const ModelConfig& config, const CpuWeights& weights, std::byte* base)
      : source_(source), config_(config), weights_(weights), base_(base) {}

  PackedMatrix Matrix(const std::string& tensor, int32_t rows, int32_t cols) {
    PackedMatrix matrix = Reserve(weights_.format_, rows, cols);
    Fill(tensor, rows, matrix, 1, 0, nullptr);
    return matrix;
  }
  // Three quarters of what int4 costs in quality came from the head, and it is a fiftieth of Ling-mini's
  // weights.
  PackedMatrix Head(const std::string& tensor, int32_t rows, int32_t cols,
                    const std::vector<float>* column_scale) {
    const bool int4 = weights_.format_ == WeightFormat::kInt4;
    PackedMatrix matrix = Reserve(int4 ? WeightFormat::kInt8 : weights_.format_, rows, cols);
    Fill(tensor, rows, matrix, 1, 0, column_scale);
    return matrix;
  }
  // The router decides by small differences: as it is stored, bf16 or wider.
  PackedMatrix Router(const std::string& tensor, int32_t rows, int32_t cols) {
    const StatusOr<DType> dtype = source_.TypeOf(tensor);
    const bool bf16 = dtype.ok() && *dtype == DType::kBf16;
    PackedMatrix matrix = Reserve(bf16 ? WeightFormat::kBf16 : WeightFormat::kF32, rows, cols);
    Fill(tensor, rows, matrix, 1, 0, nullptr);
    return matrix;
  }
  const void* Embedding(const std::string& tensor, int32_t rows, int32_t cols) {
    PackJob job;
    job.bf16 = weights_.precision_ == Precision::kBfloat16;
    job.destination = Place(static_cast<size_t>(rows) * static_cast<size_t>(cols) * (job.bf16 ? 2 : 4));
    job.tensor = tensor;
    job.cols = cols;
    Split(job, rows);
    return job.destination;
  }
  FfnWeights Ffn(const std::string& prefix, int32_t width) {
    FfnWeights ffn;
    ffn.width = width;
    const int32_t strips = (width + kStripRows - 1) / kStripRows;
    ffn.gate_up = Reserve(weights_.format_, 2 * strips * kStripRows, config_.hidden_size);
    Fill(prefix + ".gate_proj.weight", width, ffn.gate_up, 2, 0, nullptr);
    Fill(prefix + ".up_proj.weight", width, ffn.gate_up, 2, 1, nullptr);
    ffn.down = Matrix(prefix + ".down_proj.weight", config_.hidden_size, width);
    return ffn;
  }
  size_t bytes() const { return bytes_; }
  std::vector<PackJob> TakeJobs() { return std::move(jobs_); }

 private:
  std::byte* Place(size_t size) {
    const size_t offset = bytes_;
    bytes_ += (size + 63) / 64 * 64;
    return base_ == nullptr ? nullptr : base_ + offset;
  }
  PackedMatrix Reserve(WeightFormat format, int32_t rows, int32_t cols) {
    PackedMatrix matrix = MakePackedMatrix(format, rows, cols);
    matrix.data = reinterpret_cast<const char*>(Place(PackedBytes(matrix)));
    return matrix;
  }
  void Fill(const std::string& tensor, int64_t rows, const PackedMatrix& matrix, int32_t strip_step,
            int32_t strip_first, const std::vector<float>* column_scale) {
    PackJob job;
    job.tensor = tensor;
    job.cols = matrix.cols;
    job.destination = reinterpret_cast<std::byte*>(const_cast<char*>(matrix.data));
    job.matrix = matrix;
    job.strip_step = strip_step;
    job.strip_first = strip_first;
    job.column_scale = column_scale;
    Split(job, rows);
  }
  void Split(PackJob job, int64_t rows) {
    if (base_ == nullptr) return;
    for (job.first_row = 0; job.first_row < rows; job.first_row += kRowsPerJob) {
      job.rows = std::min(kRowsPerJob, rows - job.first_row);
      jobs_.push_back(job);
    }
  }

  const TensorSource& source_;
  const ModelConfig& config_;
  const CpuWeights& weights_;
  std::byte* const base_;
  size_t bytes_ = 0;
  std::vector<PackJob> jobs_;
};

StatusOr<std::vector<float>> Vector(const TensorSource& source, const std::string& tensor, int32_t size) {
  std::vector<float> values(static_cast<size_t>(size));
  MR_RETURN_IF_ERROR(source.ReadRows(tensor, 0, 1, values));
  return values;
}

using Holds = std::function<bool(int32_t layer, int32_t expert)>;

std::string ExpertPrefix(int32_t layer, int32_t expert) {
  return fmt::format("model.layers.{}.mlp.experts.{}", layer, expert);
}

void PlanLayer(const ModelConfig& config, int32_t index, bool moe, const Holds& holds, Planner& planner,
               LayerWeights* layer) {
  const std::string prefix = fmt::format("model.layers.{}.", index);
  layer->qkv = planner.Matrix(prefix + "attention.query_key_value.weight",
                              config.q_size() + 2 * config.kv_size(), config.hidden_size);
  layer->dense = planner.Matrix(prefix + "attention.dense.weight", config.hidden_size, config.q_size());
  layer->moe = moe;
  if (!moe) {
    layer->ffn = planner.Ffn(prefix + "mlp", config.intermediate_size);
    return;
  }
  if (config.shared_intermediate_size > 0) {
    layer->ffn = planner.Ffn(prefix + "mlp.shared_experts", config.shared_intermediate_size);
  }
  layer->router = planner.Router(prefix + "mlp.gate.weight", config.num_experts, config.hidden_size);
  layer->experts.clear();
  for (int32_t e = 0; e < config.num_experts; ++e) {
    FfnWeights& expert = layer->experts.emplace_back();
    if (!holds || holds(index, e)) expert = planner.Ffn(ExpertPrefix(index, e), config.moe_intermediate_size);
  }
}

void PlanModel(const ModelConfig& config, const std::vector<float>* head_scale, const Holds& holds,
               Planner& planner, CpuWeights* weights) {
  weights->embedding =
      planner.Embedding("model.word_embeddings.weight", config.vocab_size, config.hidden_size);
  weights->head = planner.Head(config.tie_word_embeddings ? "model.word_embeddings.weight" : "lm_head.weight",
                               config.vocab_size, config.hidden_size, head_scale);
  weights->layers.resize(static_cast<size_t>(config.num_layers));
  for (int32_t l = 0; l < config.num_layers; ++l) {
    PlanLayer(config, l, config.is_moe_layer(l), holds, planner, &weights->layers[static_cast<size_t>(l)]);
  }
  weights->mtp.resize(static_cast<size_t>(config.num_mtp_layers));
  for (MtpWeights& mtp : weights->mtp) {
    mtp.projection = planner.Matrix(fmt::format("model.layers.{}.eh_proj.weight", config.num_layers),
                                    config.hidden_size, 2 * config.hidden_size);
    PlanLayer(config, config.num_layers, true, holds, planner, &mtp.layer);
  }
}

Status ReadLayerVectors(const TensorSource& source, const ModelConfig& config, int32_t index,
                        LayerWeights* layer) {
  const std::string prefix = fmt::format("model.layers.{}.", index);
  const int32_t hidden = config.hidden_size;
  MR_ASSIGN_OR_RETURN(layer->input_norm, Vector(source, prefix + "input_layernorm.weight", hidden));
  MR_ASSIGN_OR_RETURN(layer->post_norm, Vector(source, prefix + "post_attention_layernorm.weight", hidden));
  if (config.use_qk_norm) {
    MR_ASSIGN_OR_RETURN(layer->query_norm,
                        Vector(source, prefix + "attention.query_layernorm.weight", config.head_dim));
    MR_ASSIGN_OR_RETURN(layer->key_norm,
                        Vector(source, prefix + "attention.key_layernorm.weight", config.head_dim));
  }
  if (config.qkv_bias) {
    MR_ASSIGN_OR_RETURN(layer->qkv_bias, Vector(source, prefix + "attention.query_key_value.bias",
                                                config.q_size() + 2 * config.kv_size()));
  }
  if (config.dense_bias) {
    MR_ASSIGN_OR_RETURN(layer->dense_bias, Vector(source, prefix + "attention.dense.bias", hidden));
  }
  if (layer->moe && config.expert_bias) {
    MR_ASSIGN_OR_RETURN(layer->expert_bias,
                        Vector(source, prefix + "mlp.gate.expert_bias", config.num_experts));
  }
  return OkStatus();
}

Status ReadVectors(const TensorSource& source, const ModelConfig& config, CpuWeights* weights) {
  const int32_t hidden = config.hidden_size;
  MR_ASSIGN_OR_RETURN(weights->final_norm, Vector(source, "model.norm.weight", hidden));
  for (int32_t l = 0; l < config.num_layers; ++l) {
    MR_RETURN_IF_ERROR(ReadLayerVectors(source, config, l, &weights->layers[static_cast<size_t>(l)]));
  }
  for (MtpWeights& mtp : weights->mtp) {
    const std::string prefix = fmt::format("model.layers.{}.", config.num_layers);
    MR_ASSIGN_OR_RETURN(mtp.embedding_norm, Vector(source, prefix + "enorm.weight", hidden));
    MR_ASSIGN_OR_RETURN(mtp.hidden_norm, Vector(source, prefix + "hnorm.weight", hidden));
    MR_ASSIGN_OR_RETURN(mtp.final_norm, Vector(source, prefix + "final_layernorm.weight", hidden));
    MR_RETURN_IF_ERROR(ReadLayerVectors(source, config, config.num_layers, &mtp.layer));
  }
  return OkStatus();
}

// norm_head: every hidden column of the output matrix is divided by its norm over the whole vocabulary, once,
// here.
StatusOr<std::vector<float>> HeadColumnScale(const TensorSource& source, const ModelConfig& config) {
  const auto cols = static_cast<size_t>(config.hidden_size);
  std::vector<double> squares(cols);
  std::vector<float> rows(static_cast<size_t>(kRowsPerJob) * cols);
  for (int64_t row = 0; row < config.vocab_size; row += kRowsPerJob) {
    const int64_t count = std::min<int64_t>(kRowsPerJob, config.vocab_size - row);
    const std::span<float> block = std::span(rows).first(static_cast<size_t>(count) * cols);
    MR_RETURN_IF_ERROR(source.ReadRows("lm_head.weight", row, count, block));
    for (size_t i = 0; i < block.size(); ++i) squares[i % cols] += double{block[i]} * block[i];
  }
  std::vector<float> scale(cols);
  for (size_t k = 0; k < cols; ++k) scale[k] = static_cast<float>(1.0 / (std::sqrt(squares[k]) + 1e-7));
  return scale;
}

Status RunJobs(const TensorSource& source, const std::vector<PackJob>& jobs,
               const CpuWeightsOptions& options) {
  size_t total = 0;
  for (const PackJob& job : jobs) total += job.bytes();
  return RunParallel(jobs.size(), total, options,
                     [&](size_t i, std::vector<float>* scratch) -> StatusOr<size_t> {
                       MR_RETURN_IF_ERROR(RunJob(source, jobs[i], scratch));
                       return jobs[i].bytes();
                     });
}

}  // namespace

size_t ExpertBytes(const ModelConfig& config, WeightFormat format) {
  const int32_t strips = (config.moe_intermediate_size + kStripRows - 1) / kStripRows;
  const auto bytes = [&](int32_t rows, int32_t cols) {
    return (PackedBytes(MakePackedMatrix(format, rows, cols)) + 63) / 64 * 64;
  };
  return bytes(2 * strips * kStripRows, config.hidden_size) +
         bytes(config.hidden_size, config.moe_intermediate_size);
}

StatusOr<FfnWeights> LoadExpert(const TensorSource& source, const CpuWeights& weights, int32_t layer,
                                int32_t expert, std::span<std::byte> memory) {
  Planner planner(source, weights.config_, weights, memory.data());
  const FfnWeights ffn = planner.Ffn(ExpertPrefix(layer, expert), weights.config_.moe_intermediate_size);
  MR_CHECK(planner.bytes() <= memory.size());
  std::memset(memory.data(), 0, memory.size());  // padding
  std::vector<float> scratch;
  for (const PackJob& job : planner.TakeJobs()) MR_RETURN_IF_ERROR(RunJob(source, job, &scratch));
  return ffn;
}

StatusOr<std::shared_ptr<const Weights>> LoadCpuWeights(const TensorSource& source, const ModelConfig& config,
                                                        const CpuWeightsOptions& options) {
  auto weights = std::make_shared<CpuWeights>();
  weights->config_ = config;
  weights->precision_ = options.precision;
  weights->format_ = FormatOf(options);
  std::vector<float> head_scale;
  if (config.norm_head) {
    MR_ASSIGN_OR_RETURN(head_scale, HeadColumnScale(source, config));
  }
  const std::vector<float>* scale = config.norm_head ? &head_scale : nullptr;
  Planner sizing(source, config, *weights, nullptr);
  PlanModel(config, scale, options.holds, sizing, weights.get());
  MR_ASSIGN_OR_RETURN(weights->memory_, HugeMemory::Allocate(sizing.bytes(), "weights"));
  Planner planner(source, config, *weights, weights->memory_.bytes().data());
  PlanModel(config, scale, options.holds, planner, weights.get());
  MR_RETURN_IF_ERROR(ReadVectors(source, config, weights.get()));
  const WeightCache cache(options, weights->precision_, weights->format_);
  if (!cache.Read(weights->memory_.bytes())) {
    MR_RETURN_IF_ERROR(RunJobs(source, planner.TakeJobs(), options));
    cache.Write(weights->memory_.bytes());
  }
  return std::shared_ptr<const Weights>(std::move(weights));
}

}  // namespace millrace::engine
