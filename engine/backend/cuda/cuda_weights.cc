// Checkpoint to GPU: every tensor becomes jobs of a few MB, read by a few threads into page-locked buffers
// and copied from there to its place while the next job is read.
#include "engine/backend/cuda/cuda_weights.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <mutex>
#include <thread>

#include "base/cpu.h"
#include "engine/backend/cpu/bfloat16.h"
#include "engine/backend/cpu/rope.h"
#include "engine/model/fp8_scales.h"

namespace millrace::engine {
namespace {

using cuda::DeviceLayer;
using cuda::DeviceModel;
using cuda::ModelShape;

constexpr int64_t kStagingBytes = int64_t{8} << 20;
constexpr int kLoadThreadsMax = 8;

// kBf16Rest: what bf16 leaves of an fp32 value, itself in bf16. kCodes: the tensor's bytes as they are
// (e4m3).
enum class Form { kBf16, kBf16Rest, kFloat, kCodes };

// A block of a matrix (or a vector as one row) to be read, converted and copied.
struct UploadJob {
  std::string tensor;
  int64_t first_row = 0;
  int64_t rows = 0;
  int64_t first_col = 0;
  int64_t cols = 0;         // of the block
  int64_t tensor_cols = 0;  // of the tensor
  Form form = Form::kBf16;
  void* destination = nullptr;                       // on the device, of first_row
  int64_t pitch = 0;                                 // elements from row to row there
  const std::vector<float>* column_scale = nullptr;  // norm_head

  int64_t element_bytes() const { return form == Form::kFloat ? 4 : form == Form::kCodes ? 1 : 2; }
  int64_t bytes() const { return rows * cols * element_bytes(); }
};

// Lists the jobs of a whole model.
class JobList {
 public:
  JobList(const ModelConfig& config, const DeviceModel& model) : config_(config), model_(model) {}

  std::vector<UploadJob> Make(const std::vector<float>* head_scale) {
    const int64_t hidden = config_.hidden_size;
    Matrix("model.word_embeddings.weight", model_.embedding, config_.vocab_size, hidden);
    if (!config_.tie_word_embeddings) {
      Matrix("lm_head.weight", model_.head, config_.vocab_size, hidden, head_scale);
    }
    Vector("model.norm.weight", model_.final_norm, hidden);
    for (size_t l = 0; l < model_.layers.size(); ++l) {
      AddLayer(fmt::format("model.layers.{}.", l), model_.layers[l]);
    }
    if (model_.shape.mtp) {
      const std::string prefix = fmt::format("model.layers.{}.", config_.num_layers);
      Matrix(prefix + "eh_proj.weight", model_.mtp_projection, hidden, 2 * hidden);
      Vector(prefix + "enorm.weight", model_.mtp_embedding_norm, hidden);
      Vector(prefix + "hnorm.weight", model_.mtp_hidden_norm, hidden);
      Vector(prefix + "final_layernorm.weight", model_.mtp_final_norm, hidden);
    }
    return std::move(jobs_);
  }

 private:
  void AddLayer(const std::string& prefix, const DeviceLayer& layer) {
    const int64_t hidden = config_.hidden_size;
    const int64_t qkv = config_.q_size() + 2 * config_.kv_size();
    Vector(prefix + "input_layernorm.weight", layer.input_norm, hidden);
    Vector(prefix + "post_attention_layernorm.weight", layer.post_norm, hidden);
    Matrix(prefix + "attention.query_key_value.weight", layer.qkv, qkv, hidden);
    Matrix(prefix + "attention.dense.weight", layer.attention_out, hidden, config_.q_size());
    if (layer.qkv_bias != nullptr) Vector(prefix + "attention.query_key_value.bias", layer.qkv_bias, qkv);
    if (layer.attention_out_bias != nullptr)
      Vector(prefix + "attention.dense.bias", layer.attention_out_bias, hidden);
    if (layer.query_norm != nullptr) {
      Vector(prefix + "attention.query_layernorm.weight", layer.query_norm, config_.head_dim);
      Vector(prefix + "attention.key_layernorm.weight", layer.key_norm, config_.head_dim);
    }
    if (!layer.moe)
      return Ffn(prefix + "mlp", layer, 0, config_.intermediate_size, 0, config_.intermediate_size);
    Matrix(prefix + "mlp.gate.weight", layer.router, config_.num_experts, hidden);
    if (layer.router_low != nullptr) {
      Matrix(prefix + "mlp.gate.weight", layer.router_low, config_.num_experts, hidden, nullptr,
             Form::kBf16Rest);
    }
    if (layer.expert_bias != nullptr)
      Vector(prefix + "mlp.gate.expert_bias", layer.expert_bias, config_.num_experts);
    const int64_t width = config_.moe_intermediate_size;
    for (int64_t e = 0; e < config_.num_experts; ++e) {
      Ffn(fmt::format("{}mlp.experts.{}", prefix, e), layer, e, width, 0, width);
    }
    for (int64_t s = 0; s < model_.shape.num_shared; ++s) {
      Ffn(prefix + "mlp.shared_experts", layer, config_.num_experts + s, width, s * width,
          config_.shared_intermediate_size);
    }
  }

  // Columns [first, first + width) of an FFN of width all, as expert `index` of the layer.
  void Ffn(const std::string& prefix, const DeviceLayer& layer, int64_t index, int64_t width, int64_t first,
           int64_t all) {
    const int64_t hidden = config_.hidden_size;
    const int64_t at = index * width * hidden;
    if (layer.gate_up_e4m3 == nullptr) {
      return Three(prefix, ".weight", Form::kBf16, layer.gate_up + 2 * at, layer.gate_up + 2 * at + hidden,
                   2 * hidden, layer.down + at, width, first, all, hidden);
    }
    Three(prefix, ".weight", Form::kCodes, layer.gate_up_e4m3 + 2 * at, layer.gate_up_e4m3 + 2 * at + hidden,
          2 * hidden, layer.down_e4m3 + at, width, first, all, hidden);
    // Scales: gate's and up's matrices one after the other.
    const int64_t rows = width / kFp8Block;
    const int64_t cols = hidden / kFp8Block;
    float* const gate = layer.gate_up_scales + index * 2 * rows * cols;
    Three(prefix, std::string(".weight") + kFp8ScaleSuffix, Form::kFloat, gate, gate + rows * cols, cols,
          layer.down_scales + index * rows * cols, rows, first / kFp8Block, all / kFp8Block, cols);
  }
  // gate, up [width, hidden] with rows `pitch` apart, and down [hidden, width].
  void Three(const std::string& prefix, const std::string& suffix, Form form, void* gate, void* up,
             int64_t pitch, void* down, int64_t width, int64_t first, int64_t all, int64_t hidden) {
    UploadJob job;
    job.form = form;
    job.cols = job.tensor_cols = hidden;
    job.pitch = pitch;
    job.tensor = prefix + ".gate_proj" + suffix;
    job.destination = gate;
    Add(job, first, width);
    job.tensor = prefix + ".up_proj" + suffix;
    job.destination = up;
    Add(job, first, width);
    job.tensor = prefix + ".down_proj" + suffix;
    job.first_col = first;
    job.cols = job.pitch = width;
    job.tensor_cols = all;
    job.destination = down;
    Add(job, 0, hidden);
  }
  void Matrix(const std::string& tensor, __nv_bfloat16* destination, int64_t rows, int64_t cols,
              const std::vector<float>* column_scale = nullptr, Form form = Form::kBf16) {
    UploadJob job;
    job.tensor = tensor;
    job.cols = job.tensor_cols = job.pitch = cols;
    job.form = form;
    job.destination = destination;
    job.column_scale = column_scale;
    Add(job, 0, rows);
  }
  void Vector(const std::string& tensor, float* destination, int64_t size) {
    UploadJob job;
    job.tensor = tensor;
    job.cols = job.tensor_cols = job.pitch = size;
    job.form = Form::kFloat;
    job.destination = destination;
    Add(job, 0, 1);
  }
  // `rows` rows from first_row on, cut so that a job fits a staging buffer.
  void Add(UploadJob job, int64_t first_row, int64_t rows) {
    auto* const begin = static_cast<std::byte*>(job.destination);
    const int64_t rows_max = std::max<int64_t>(1, kStagingBytes / (job.cols * job.element_bytes()));
    for (int64_t done = 0; done < rows; done += rows_max) {
      job.first_row = first_row + done;
      job.rows = std::min(rows_max, rows - done);
      job.destination = begin + done * job.pitch * job.element_bytes();
      jobs_.push_back(job);
    }
  }

  const ModelConfig& config_;
  const DeviceModel& model_;
  std::vector<UploadJob> jobs_;
};

// Fills `out` with the job's block, rows densely one after another.
Status ReadBlock(const Checkpoint& checkpoint, const UploadJob& job, std::byte* out) {
  MR_ASSIGN_OR_RETURN(const TensorView tensor, checkpoint.Tensor(job.tensor));
  const bool same_bf16 =
      tensor.dtype == DType::kBf16 && job.form == Form::kBf16 && job.column_scale == nullptr;
  if (same_bf16 || job.form == Form::kCodes) {
    const int64_t size = job.element_bytes();
    for (int64_t r = 0; r < job.rows; ++r) {
      std::memcpy(out + r * job.cols * size,
                  tensor.bytes.data() + ((job.first_row + r) * job.tensor_cols + job.first_col) * size,
                  static_cast<size_t>(job.cols * size));
    }
    return OkStatus();
  }
  std::vector<float> row(static_cast<size_t>(job.tensor_cols));
  for (int64_t r = 0; r < job.rows; ++r) {
    MR_RETURN_IF_ERROR(checkpoint.ReadRows(job.tensor, job.first_row + r, 1, row));
    for (int64_t c = 0; c < job.cols; ++c) {
      float value = row[static_cast<size_t>(job.first_col + c)];
      if (job.column_scale != nullptr) value *= (*job.column_scale)[static_cast<size_t>(job.first_col + c)];
      const int64_t index = r * job.cols + c;
      if (job.form == Form::kFloat) {
        std::memcpy(out + index * 4, &value, 4);
        continue;
      }
      uint16_t narrow = ToBf16(value);
      if (job.form == Form::kBf16Rest) narrow = ToBf16(value - FromBf16(narrow));
      std::memcpy(out + index * 2, &narrow, 2);
    }
  }
  return OkStatus();
}

// One loading thread's stream and pair of buffers.
class Uploader {
 public:
  Status Open() {
    MR_RETURN_IF_ERROR(
        ToStatus(cuda::PinnedMemory::Allocate(2 * kStagingBytes, "loading weights", &staging_)));
    return ToStatus(OpenStream());
  }
  ~Uploader() {
    if (stream_ == nullptr) return;
    cudaStreamSynchronize(stream_);
    for (const cudaEvent_t event : free_) cudaEventDestroy(event);
    cudaStreamDestroy(stream_);
  }
  Status Upload(const Checkpoint& checkpoint, const UploadJob& job) {
    MR_RETURN_IF_ERROR(ToStatus(AwaitBuffer()));
    MR_RETURN_IF_ERROR(ReadBlock(checkpoint, job, buffer()));
    return ToStatus(Copy(job));
  }
  Status Finish() { return ToStatus(Synchronise()); }

 private:
  std::byte* buffer() const { return staging_.data() + next_ * kStagingBytes; }
  cuda::Result OpenStream() {
    MR_CUDA(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking));
    for (cudaEvent_t& event : free_) MR_CUDA(cudaEventCreateWithFlags(&event, cudaEventDisableTiming));
    return cuda::Result();
  }
  cuda::Result AwaitBuffer() {
    MR_CUDA(cudaEventSynchronize(free_[next_]));
    return cuda::Result();
  }
  cuda::Result Copy(const UploadJob& job) {
    const auto row_bytes = static_cast<size_t>(job.cols * job.element_bytes());
    MR_CUDA(cudaMemcpy2DAsync(job.destination, static_cast<size_t>(job.pitch * job.element_bytes()), buffer(),
                              row_bytes, row_bytes, static_cast<size_t>(job.rows), cudaMemcpyHostToDevice,
                              stream_));
    MR_CUDA(cudaEventRecord(free_[next_], stream_));
    next_ = 1 - next_;
    return cuda::Result();
  }
  cuda::Result Synchronise() {
    MR_CUDA(cudaStreamSynchronize(stream_));
    return cuda::Result();
  }

  cuda::PinnedMemory staging_;
  cudaStream_t stream_ = nullptr;
  cudaEvent_t free_[2] = {};  // the copy out of this buffer is done
  int next_ = 0;
};

Status RunJobs(const Checkpoint& checkpoint, const std::vector<UploadJob>& jobs,
               const CudaWeightsOptions& options) {
  size_t total = 0;
  for (const UploadJob& job : jobs) total += static_cast<size_t>(job.bytes());
  std::atomic<size_t> next{0};
  std::atomic<size_t> done{0};
  std::atomic<int> running{0};
  std::mutex mutex;
  Status failure;
  const auto load = [&] {
    Uploader uploader;
    Status status = uploader.Open();
    for (size_t i = next++; status.ok() && i < jobs.size(); i = next++) {
      status = uploader.Upload(checkpoint, jobs[i]);
      done += static_cast<size_t>(jobs[i].bytes());
    }
    if (status.ok()) status = uploader.Finish();
    if (!status.ok()) {
      const std::lock_guard lock(mutex);
      if (failure.ok()) failure = std::move(status);
      next = jobs.size();
    }
    --running;
  };
  const int threads =
      std::clamp(options.num_threads > 0 ? options.num_threads : UsableCpuCount(), 1, kLoadThreadsMax);
  running = threads;
  std::vector<std::jthread> helpers;
  for (int i = 0; i < threads; ++i) helpers.emplace_back(load);
  while (running > 0) {
    std::this_thread::sleep_for(std::chrono::milliseconds(20));
    if (options.progress) options.progress(std::min<size_t>(done, total - 1), total);
  }
  helpers.clear();
  if (failure.ok() && options.progress) options.progress(total, total);
  return failure;
}

// 1 / (norm + 1e-7) of every hidden column of the output matrix over the whole vocabulary (norm_head).
StatusOr<std::vector<float>> HeadColumnScale(const Checkpoint& checkpoint, const ModelConfig& config) {
  std::vector<float> row(static_cast<size_t>(config.hidden_size));
  std::vector<double> squares(row.size());
  for (int64_t r = 0; r < config.vocab_size; ++r) {
    MR_RETURN_IF_ERROR(checkpoint.ReadRows("lm_head.weight", r, 1, row));
    for (size_t i = 0; i < row.size(); ++i) squares[i] += double{row[i]} * row[i];
  }
  for (size_t i = 0; i < row.size(); ++i) row[i] = static_cast<float>(1.0 / (std::sqrt(squares[i]) + 1e-7));
  return row;
}

Status UploadRope(const ModelConfig& config, const DeviceModel& model) {
  const Rope rope(config);
  const auto width = static_cast<size_t>(2 * rope.pairs());
  std::vector<float> table(static_cast<size_t>(config.max_position) * width);
  for (int32_t p = 0; p < config.max_position; ++p) {
    float* const at = table.data() + static_cast<size_t>(p) * width;
    rope.Angles(p, at, at + rope.pairs());
  }
  const cudaError_t error =
      cudaMemcpy(model.rope, table.data(), table.size() * sizeof(float), cudaMemcpyHostToDevice);
  return error == cudaSuccess ? OkStatus() : ToStatus(cuda::CudaFailure(error, "copying the rotary table"));
}

// True if every expert's matrices are e4m3 in the file and made of whole blocks: then they stay as they are.
StatusOr<bool> ExpertsAreFp8(const Checkpoint& checkpoint, const ModelConfig& config) {
  if (config.fp8_block != kFp8Block || config.hidden_size % kFp8Block != 0 ||
      config.moe_intermediate_size % kFp8Block != 0) {
    return false;
  }
  for (int32_t l = config.num_dense_layers; l < config.num_kv_layers(); ++l) {
    std::vector<std::string> ffns;
    if (config.shared_intermediate_size > 0) ffns.push_back("shared_experts");
    for (int32_t e = 0; e < config.num_experts; ++e) ffns.push_back(fmt::format("experts.{}", e));
    for (const std::string& ffn : ffns) {
      for (const char* matrix : {"gate", "up", "down"}) {
        MR_ASSIGN_OR_RETURN(
            const TensorView tensor,
            checkpoint.Tensor(fmt::format("model.layers.{}.mlp.{}.{}_proj.weight", l, ffn, matrix)));
        if (tensor.dtype != DType::kF8E4M3) return false;
      }
    }
  }
  return true;
}

// Router weights that bf16 cannot hold get a second part.
StatusOr<bool> RouterNeedsLow(const Checkpoint& checkpoint, const ModelConfig& config) {
  for (int32_t l = config.num_dense_layers; l < config.num_kv_layers(); ++l) {
    MR_ASSIGN_OR_RETURN(const TensorView gate,
                        checkpoint.Tensor(fmt::format("model.layers.{}.mlp.gate.weight", l)));
    if (gate.dtype != DType::kBf16) return true;
  }
  return false;
}

Status CheckDevice() {
  int count = 0;
  if (const cudaError_t error = cudaGetDeviceCount(&count); error != cudaSuccess || count == 0) {
    return Unavailable("no CUDA device: {}", error == cudaSuccess ? "none found" : cudaGetErrorString(error));
  }
  int device = 0;
  cudaDeviceProp properties = {};
  if (cudaGetDevice(&device) != cudaSuccess || cudaGetDeviceProperties(&properties, device) != cudaSuccess) {
    return Unavailable("the CUDA device does not answer");
  }
  if (properties.major != 9) {
    return Unimplemented("{} has compute capability {}.{}; the kernels are for 9.0 (Hopper)", properties.name,
                         properties.major, properties.minor);
  }
  return OkStatus();
}

}  // namespace

Status ToStatus(const cuda::Result& result) {
  if (result.ok()) return OkStatus();
  if (result.message().starts_with("not enough") || result.message().starts_with("cannot lock")) {
    return ResourceExhausted("{}", result.message());
  }
  return Internal("{}", result.message());
}

StatusOr<ModelShape> MakeModelShape(const ModelConfig& config) {
  ModelShape shape;
  shape.hidden = config.hidden_size;
  shape.num_layers = config.num_layers;
  shape.mtp = config.num_mtp_layers > 0;
  shape.heads = config.num_heads;
  shape.kv_heads = config.num_kv_heads;
  shape.head_dim = config.head_dim;
  shape.rotary_pairs = config.rotary_dim / 2;
  shape.dense_layers = config.num_dense_layers;
  shape.dense_width = config.intermediate_size;
  shape.expert_width = config.moe_intermediate_size;
  shape.num_experts = config.num_experts;
  shape.num_shared = config.shared_intermediate_size / config.moe_intermediate_size;
  shape.top_k = config.experts_per_token;
  shape.num_groups = config.num_groups;
  shape.groups_per_token = config.groups_per_token;
  shape.sigmoid_router = config.sigmoid_router;
  shape.norm_topk_prob = config.norm_topk_prob;
  shape.scaling = config.routed_scaling_factor;
  shape.expert_bias = config.expert_bias;
  shape.qk_norm = config.use_qk_norm;
  shape.qkv_bias = config.qkv_bias;
  shape.dense_bias = config.dense_bias;
  shape.tied_embeddings = config.tie_word_embeddings;
  shape.eps = config.rms_norm_eps;
  shape.vocab = config.vocab_size;
  shape.max_position = config.max_position;
  if (config.shared_intermediate_size % config.moe_intermediate_size != 0) {
    return Unimplemented(
        "the CUDA backend wants a shared expert whose width ({}) is a multiple of the routed ones' ({})",
        config.shared_intermediate_size, config.moe_intermediate_size);
  }
  if (config.tie_word_embeddings && config.norm_head) {
    return Unimplemented("the CUDA backend has no norm_head on tied embeddings");
  }
  if (const char* reason = shape.Unsupported(); reason != nullptr) {
    return Unimplemented("the CUDA backend cannot run this model: {}", reason);
  }
  return shape;
}

StatusOr<std::shared_ptr<const Weights>> LoadCudaWeights(const Checkpoint& checkpoint,
                                                         const ModelConfig& config,
                                                         const CudaWeightsOptions& options) {
  MR_ASSIGN_OR_RETURN(ModelShape shape, MakeModelShape(config));
  MR_RETURN_IF_ERROR(CheckDevice());
  MR_ASSIGN_OR_RETURN(shape.router_low, RouterNeedsLow(checkpoint, config));
  MR_ASSIGN_OR_RETURN(shape.fp8_experts, ExpertsAreFp8(checkpoint, config));
  auto weights = std::make_shared<CudaWeights>();
  weights->config_ = config;
  const size_t bytes = cuda::PlanModel(shape, nullptr, &weights->model);
  MR_RETURN_IF_ERROR(ToStatus(cuda::DeviceMemory::Allocate(bytes, "weights", &weights->memory_)));
  cuda::PlanModel(shape, weights->memory_.data(), &weights->model);
  std::vector<float> head_scale;
  if (config.norm_head) {
    MR_ASSIGN_OR_RETURN(head_scale, HeadColumnScale(checkpoint, config));
  }
  MR_RETURN_IF_ERROR(UploadRope(config, weights->model));
  MR_RETURN_IF_ERROR(RunJobs(
      checkpoint, JobList(config, weights->model).Make(config.norm_head ? &head_scale : nullptr), options));
  return std::shared_ptr<const Weights>(std::move(weights));
}

}  // namespace millrace::engine
