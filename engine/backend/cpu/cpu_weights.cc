#include "engine/backend/cpu/cpu_weights.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <mutex>
#include <thread>

#include "base/check.h"
#include "base/clock.h"
#include "base/cpu.h"
#include "engine/backend/cpu/bfloat16.h"

namespace millrace::engine {
namespace {

constexpr int64_t kRowsPerJob = 512;  // a multiple of kStripRows: what is expanded to fp32 at a time

// Rows of one matrix to be read, converted and packed into their place.
struct PackJob {
  std::string tensor;
  int64_t first_row = 0;
  int64_t rows = 0;
  int64_t cols = 0;
  bool bf16 = false;
  bool strips = true;                                // else row by row, for the embedding
  std::byte* destination = nullptr;                  // of the whole matrix
  const std::vector<float>* column_scale = nullptr;  // norm_head
};

void Store(float value, bool bf16, std::byte* at, size_t index) {
  if (bf16) {
    const uint16_t narrow = ToBf16(value);
    std::memcpy(at + index * 2, &narrow, 2);
  } else {
    std::memcpy(at + index * 4, &value, 4);
  }
}

Status RunJob(const Checkpoint& checkpoint, const PackJob& job) {
  std::vector<float> rows(static_cast<size_t>(job.rows * job.cols));
  MR_RETURN_IF_ERROR(checkpoint.ReadRows(job.tensor, job.first_row, job.rows, rows));
  if (job.column_scale != nullptr) {
    for (size_t i = 0; i < rows.size(); ++i)
      rows[i] *= (*job.column_scale)[i % static_cast<size_t>(job.cols)];
  }
  for (int64_t r = 0; r < job.rows; ++r) {
    const int64_t row = job.first_row + r;
    const float* source = rows.data() + r * job.cols;
    for (int64_t k = 0; k < job.cols; ++k) {
      const int64_t index =
          job.strips ? (row / kStripRows * job.cols + k) * kStripRows + row % kStripRows : row * job.cols + k;
      Store(source[k], job.bf16, job.destination, static_cast<size_t>(index));
    }
  }
  return OkStatus();
}

// Lays matrices out one after another. Run twice: first without memory, to learn the size.
class Planner {
 public:
  Planner(const ModelConfig& config, Precision precision, std::byte* base)
      : config_(config), bf16_(precision == Precision::kBfloat16), base_(base) {}

  PackedMatrix Matrix(const std::string& tensor, int32_t rows, int32_t cols, bool always_f32 = false,
                      const std::vector<float>* column_scale = nullptr) {
    const bool bf16 = bf16_ && !always_f32;
    PackedMatrix matrix;
    matrix.rows = rows;
    matrix.cols = cols;
    matrix.data = Place(tensor, rows, cols, int64_t{matrix.strips()} * kStripRows, bf16, true, column_scale);
    return matrix;
  }
  const void* Rows(const std::string& tensor, int32_t rows, int32_t cols) {
    return Place(tensor, rows, cols, rows, bf16_, false, nullptr);
  }
  FfnWeights Ffn(const std::string& prefix, int32_t width) {
    FfnWeights ffn;
    ffn.gate = Matrix(prefix + ".gate_proj.weight", width, config_.hidden_size);
    ffn.up = Matrix(prefix + ".up_proj.weight", width, config_.hidden_size);
    ffn.down = Matrix(prefix + ".down_proj.weight", config_.hidden_size, width);
    return ffn;
  }
  size_t bytes() const { return bytes_; }
  std::vector<PackJob> TakeJobs() { return std::move(jobs_); }

 private:
  const void* Place(const std::string& tensor, int64_t rows, int64_t cols, int64_t padded_rows, bool bf16,
                    bool strips, const std::vector<float>* column_scale) {
    const size_t offset = bytes_;
    const size_t size = static_cast<size_t>(padded_rows * cols) * (bf16 ? 2 : 4);
    bytes_ += (size + 63) / 64 * 64;
    if (base_ == nullptr) return nullptr;
    for (int64_t row = 0; row < rows; row += kRowsPerJob) {
      jobs_.push_back(
          {tensor, row, std::min(kRowsPerJob, rows - row), cols, bf16, strips, base_ + offset, column_scale});
    }
    return base_ + offset;
  }

  const ModelConfig& config_;
  const bool bf16_;
  std::byte* const base_;
  size_t bytes_ = 0;
  std::vector<PackJob> jobs_;
};

StatusOr<std::vector<float>> Vector(const Checkpoint& checkpoint, const std::string& tensor, int32_t size) {
  std::vector<float> values(static_cast<size_t>(size));
  MR_RETURN_IF_ERROR(checkpoint.ReadRows(tensor, 0, 1, values));
  return values;
}

void PlanLayer(const ModelConfig& config, int32_t index, bool moe, Planner& planner, LayerWeights* layer) {
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
  layer->router = planner.Matrix(prefix + "mlp.gate.weight", config.num_experts, config.hidden_size, true);
  layer->experts.clear();
  for (int32_t e = 0; e < config.num_experts; ++e) {
    layer->experts.push_back(
        planner.Ffn(fmt::format("{}mlp.experts.{}", prefix, e), config.moe_intermediate_size));
  }
}

void PlanModel(const ModelConfig& config, const std::vector<float>* head_scale, Planner& planner,
               CpuWeights* weights) {
  weights->embedding = planner.Rows("model.word_embeddings.weight", config.vocab_size, config.hidden_size);
  weights->head =
      planner.Matrix(config.tie_word_embeddings ? "model.word_embeddings.weight" : "lm_head.weight",
                     config.vocab_size, config.hidden_size, false, head_scale);
  weights->layers.resize(static_cast<size_t>(config.num_layers));
  for (int32_t l = 0; l < config.num_layers; ++l) {
    PlanLayer(config, l, config.is_moe_layer(l), planner, &weights->layers[static_cast<size_t>(l)]);
  }
  weights->mtp.resize(static_cast<size_t>(config.num_mtp_layers));
  for (MtpWeights& mtp : weights->mtp) {
    mtp.projection = planner.Matrix(fmt::format("model.layers.{}.eh_proj.weight", config.num_layers),
                                    config.hidden_size, 2 * config.hidden_size);
    PlanLayer(config, config.num_layers, true, planner, &mtp.layer);
  }
}

Status ReadLayerVectors(const Checkpoint& checkpoint, const ModelConfig& config, int32_t index,
                        LayerWeights* layer) {
  const std::string prefix = fmt::format("model.layers.{}.", index);
  const int32_t hidden = config.hidden_size;
  MR_ASSIGN_OR_RETURN(layer->input_norm, Vector(checkpoint, prefix + "input_layernorm.weight", hidden));
  MR_ASSIGN_OR_RETURN(layer->post_norm,
                      Vector(checkpoint, prefix + "post_attention_layernorm.weight", hidden));
  if (config.use_qk_norm) {
    MR_ASSIGN_OR_RETURN(layer->query_norm,
                        Vector(checkpoint, prefix + "attention.query_layernorm.weight", config.head_dim));
    MR_ASSIGN_OR_RETURN(layer->key_norm,
                        Vector(checkpoint, prefix + "attention.key_layernorm.weight", config.head_dim));
  }
  if (config.qkv_bias) {
    MR_ASSIGN_OR_RETURN(layer->qkv_bias, Vector(checkpoint, prefix + "attention.query_key_value.bias",
                                                config.q_size() + 2 * config.kv_size()));
  }
  if (config.dense_bias) {
    MR_ASSIGN_OR_RETURN(layer->dense_bias, Vector(checkpoint, prefix + "attention.dense.bias", hidden));
  }
  if (layer->moe && config.expert_bias) {
    MR_ASSIGN_OR_RETURN(layer->expert_bias,
                        Vector(checkpoint, prefix + "mlp.gate.expert_bias", config.num_experts));
  }
  return OkStatus();
}

Status ReadVectors(const Checkpoint& checkpoint, const ModelConfig& config, CpuWeights* weights) {
  const int32_t hidden = config.hidden_size;
  MR_ASSIGN_OR_RETURN(weights->final_norm, Vector(checkpoint, "model.norm.weight", hidden));
  for (int32_t l = 0; l < config.num_layers; ++l) {
    MR_RETURN_IF_ERROR(ReadLayerVectors(checkpoint, config, l, &weights->layers[static_cast<size_t>(l)]));
  }
  for (MtpWeights& mtp : weights->mtp) {
    const std::string prefix = fmt::format("model.layers.{}.", config.num_layers);
    MR_ASSIGN_OR_RETURN(mtp.embedding_norm, Vector(checkpoint, prefix + "enorm.weight", hidden));
    MR_ASSIGN_OR_RETURN(mtp.hidden_norm, Vector(checkpoint, prefix + "hnorm.weight", hidden));
    MR_ASSIGN_OR_RETURN(mtp.final_norm, Vector(checkpoint, prefix + "final_layernorm.weight", hidden));
    MR_RETURN_IF_ERROR(ReadLayerVectors(checkpoint, config, config.num_layers, &mtp.layer));
  }
  return OkStatus();
}

// norm_head: every hidden column of the output matrix is divided by its norm over the whole vocabulary, once,
// here.
StatusOr<std::vector<float>> HeadColumnScale(const Checkpoint& checkpoint, const ModelConfig& config) {
  const auto cols = static_cast<size_t>(config.hidden_size);
  std::vector<double> squares(cols);
  std::vector<float> rows(static_cast<size_t>(kRowsPerJob) * cols);
  for (int64_t row = 0; row < config.vocab_size; row += kRowsPerJob) {
    const int64_t count = std::min<int64_t>(kRowsPerJob, config.vocab_size - row);
    const std::span<float> block = std::span(rows).first(static_cast<size_t>(count) * cols);
    MR_RETURN_IF_ERROR(checkpoint.ReadRows("lm_head.weight", row, count, block));
    for (size_t i = 0; i < block.size(); ++i) squares[i % cols] += double{block[i]} * block[i];
  }
  std::vector<float> scale(cols);
  for (size_t k = 0; k < cols; ++k) scale[k] = static_cast<float>(1.0 / (std::sqrt(squares[k]) + 1e-7));
  return scale;
}

Status RunJobs(const Checkpoint& checkpoint, const std::vector<PackJob>& jobs,
               const CpuWeightsOptions& options) {
  size_t total = 0;
  for (const PackJob& job : jobs) total += static_cast<size_t>(job.rows * job.cols) * (job.bf16 ? 2 : 4);
  std::atomic<size_t> next{0};
  std::atomic<size_t> done{0};
  std::mutex mutex;
  Status failure;
  const auto work = [&] {
    for (size_t i = next++; i < jobs.size(); i = next++) {
      Status status = RunJob(checkpoint, jobs[i]);
      if (!status.ok()) {
        const std::lock_guard lock(mutex);
        if (failure.ok()) failure = std::move(status);
        next = jobs.size();
        return;
      }
      done += static_cast<size_t>(jobs[i].rows * jobs[i].cols) * (jobs[i].bf16 ? 2 : 4);
    }
  };
  const int threads = options.num_threads > 0 ? options.num_threads : UsableCpuCount();
  std::vector<std::jthread> helpers;
  for (int i = 0; i < threads; ++i) helpers.emplace_back(work);
  while (done < total && next < jobs.size()) {
    std::this_thread::sleep_for(std::chrono::milliseconds(50));
    if (options.progress) options.progress(std::min<size_t>(done, total - 1), total);
  }
  helpers.clear();
  if (failure.ok() && options.progress) options.progress(total, total);
  return failure;
}

}  // namespace

StatusOr<std::shared_ptr<const Weights>> LoadCpuWeights(const Checkpoint& checkpoint,
                                                        const ModelConfig& config,
                                                        const CpuWeightsOptions& options) {
  auto weights = std::make_shared<CpuWeights>();
  weights->config_ = config;
  weights->precision_ = options.precision;
  std::vector<float> head_scale;
  if (config.norm_head) {
    MR_ASSIGN_OR_RETURN(head_scale, HeadColumnScale(checkpoint, config));
  }
  const std::vector<float>* scale = config.norm_head ? &head_scale : nullptr;
  Planner sizing(config, options.precision, nullptr);
  PlanModel(config, scale, sizing, weights.get());
  MR_ASSIGN_OR_RETURN(weights->memory_, HugeMemory::Allocate(sizing.bytes(), "weights"));
  Planner planner(config, options.precision, weights->memory_.bytes().data());
  PlanModel(config, scale, planner, weights.get());
  MR_RETURN_IF_ERROR(ReadVectors(checkpoint, config, weights.get()));
  MR_RETURN_IF_ERROR(RunJobs(checkpoint, planner.TakeJobs(), options));
  return std::shared_ptr<const Weights>(std::move(weights));
}

}  // namespace millrace::engine
