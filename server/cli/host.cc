#include "server/cli/host.h"

#include <unistd.h>

#include <chrono>
#include <ctime>
#include <filesystem>

#include "base/log.h"
#include "engine/backend/cpu/cpu_backend.h"
#include "engine/model/checkpoint.h"

namespace millrace::server {
namespace {

// A bar on a terminal, one line per tenth elsewhere.
class LoadBar {
 public:
  void operator()(size_t done, size_t total) {
    const int percent = total == 0 ? 100 : static_cast<int>(done * 100 / total);
    const double seconds = std::chrono::duration<double>(Clock::now() - begin_).count();
    const double left =
        done == 0 ? 0 : seconds * static_cast<double>(total - done) / static_cast<double>(done);
    if (isatty(STDERR_FILENO)) {
      std::string bar(static_cast<size_t>(percent) * 40 / 100, '#');
      bar.resize(40, '.');
      fmt::print(stderr, "\rloading weights [{}] {:3d} %, {:.0f} s left ", bar, percent, left);
      if (done == total) fmt::print(stderr, "\n");
    } else if (percent / 10 > shown_ / 10 || (done == total && shown_ < 100)) {
      LogInfo("loading weights: {} %, {:.0f} s left", percent, left);
    }
    shown_ = percent;
  }

 private:
  using Clock = std::chrono::steady_clock;
  Clock::time_point begin_ = Clock::now();
  int shown_ = 0;
};

}  // namespace

std::string ModelName(const std::string& directory, const std::string& name) {
  if (!name.empty()) return name;
  std::filesystem::path path(directory);
  if (!path.has_filename()) path = path.parent_path();  // "dir/" names dir
  return path.filename().string();
}

StatusOr<ModelInfo> DescribeModel(const std::string& directory, const std::string& name) {
  MR_ASSIGN_OR_RETURN(const engine::ModelConfig config, engine::LoadModelConfig(directory));
  ModelInfo info;
  info.name = ModelName(directory, name);
  info.context_max = config.max_position;
  info.created = std::time(nullptr);
  MR_ASSIGN_OR_RETURN(info.chat_format, engine::DetectChatFormat(
                                            directory, config.architecture == engine::Architecture::kLingV2));
  return info;
}

StatusOr<LoadedModel> LoadModel(const ModelOptions& options) {
  LoadedModel model;
  MR_ASSIGN_OR_RETURN(model.config, engine::LoadModelConfig(options.model));
  MR_ASSIGN_OR_RETURN(const auto checkpoint, engine::Checkpoint::Open(options.model));
  std::vector<std::string> unused;
  MR_RETURN_IF_ERROR(engine::CheckTensors(*checkpoint, &model.config, &unused));
  if (!unused.empty()) LogWarning("{} tensors are not used, e.g. {}", unused.size(), unused.front());
  MR_ASSIGN_OR_RETURN(model.tokenizer, engine::Tokenizer::Load(options.model));
  if (model.tokenizer->size() > model.config.vocab_size) {
    return InvalidArgument("{}/tokenizer.json: {} tokens, but config.json's vocab_size is {}", options.model,
                           model.tokenizer->size(), model.config.vocab_size);
  }
  engine::CpuWeightsOptions load;
  MR_ASSIGN_OR_RETURN(load.precision, engine::ParsePrecision(options.precision));
  MR_ASSIGN_OR_RETURN(load.quantization, engine::ParseQuantization(options.quantize));
  load.num_threads = options.threads;
  load.progress = LoadBar();
  model.digest = engine::ModelDigest(*checkpoint, model.config);
  load.cache_directory = options.weight_cache;
  load.source_digest = model.digest + checkpoint->files_identity();
  MR_ASSIGN_OR_RETURN(model.weights, engine::LoadCpuWeights(*checkpoint, model.config, load));
  model.name = ModelName(options.model, options.model_name);
  LogInfo("model {}: {} layers, {} tokens of context, {:.1f} MB of weights, digest {}", model.name,
          model.config.num_layers, model.config.max_position,
          static_cast<double>(model.weights->bytes()) / 1e6, model.digest);
  if (!model.config.generation_defaults.empty()) {
    LogInfo(
        "the checkpoint suggests {} (shown, not applied: a request's own values and OpenAI's defaults count)",
        model.config.generation_defaults);
  }
  return model;
}

StatusOr<HostedWorker> StartWorker(const LoadedModel& model, const ModelOptions& options,
                                   const HostedWorkerOptions& worker_options, Metrics* metrics) {
  engine::CpuBackendOptions backend_options;
  backend_options.num_threads = options.threads;
  backend_options.batch_tokens_max = options.batch_tokens_max;
  backend_options.logit_rows_max = options.running_max;
  MR_ASSIGN_OR_RETURN(backend_options.isa, engine::ParseIsa(options.isa));
  MR_ASSIGN_OR_RETURN(const engine::Precision precision, engine::ParsePrecision(options.precision));
  MR_ASSIGN_OR_RETURN(const size_t kv_bytes, ParseBytes(options.kv_memory));
  engine::KvLayout page;
  backend_options.with_mtp = options.speculate == "auto" && model.config.num_mtp_layers > 0;
  page.num_layers = model.config.num_layers + (backend_options.with_mtp ? model.config.num_mtp_layers : 0);
  page.num_kv_heads = model.config.num_kv_heads;
  page.head_dim = model.config.head_dim;
  page.dtype = precision == engine::Precision::kFloat32 ? engine::KvDType::kF32 : engine::KvDType::kBf16;
  const size_t pages = kv_bytes / page.page_bytes();
  if (pages < 2 || pages > INT32_MAX) {
    return InvalidArgument("--kv-memory {} holds {} pages of {} bytes; at least 2 are needed",
                           options.kv_memory, pages, page.page_bytes());
  }
  backend_options.num_pages = static_cast<int32_t>(pages);
  MR_ASSIGN_OR_RETURN(auto backend, engine::MakeCpuBackend(model.weights, backend_options));

  HostedWorker hosted;
  engine::EngineOptions engine_options;
  engine_options.batch_tokens_max = options.batch_tokens_max;
  engine_options.running_max = options.running_max;
  engine_options.waiting_max = options.waiting_max;
  engine_options.num_vocabulary_tokens = model.tokenizer->size();
  engine_options.prefix_cache = options.prefix_cache == "on";
  engine_options.model_digest = model.digest;
  engine_options.speculate = backend_options.with_mtp;
  engine_options.token_gap_target =
      std::chrono::duration_cast<Duration>(std::chrono::duration<double, std::milli>(options.token_gap_ms));
  MR_ASSIGN_OR_RETURN(engine_options.host_tier_bytes, ParseBytes(options.kv_host_memory));
  MR_ASSIGN_OR_RETURN(engine_options.disk_tier_bytes, ParseBytes(options.kv_disk_size));
  engine_options.disk_tier_directory = options.kv_disk_directory;
  MR_ASSIGN_OR_RETURN(hosted.engine, engine::Engine::Create(engine_options, std::move(backend), metrics));

  transfer::Options transfer_options;
  transfer_options.listen = worker_options.rails;
  transfer_options.metrics = metrics;
  MR_ASSIGN_OR_RETURN(hosted.transfer, transfer::Transfer::Create(transfer_options));

  WorkerOptions service;
  service.role = worker_options.role;
  service.listen = worker_options.listen;
  service.model_name = model.name;
  service.model_digest = model.digest;
  service.grant_pages = worker_options.grant_pages;
  service.metrics = metrics;
  MR_ASSIGN_OR_RETURN(hosted.worker, Worker::Start(service, hosted.engine.get(), hosted.transfer.get()));
  static constexpr const char* kRoleNames[] = {"prefill", "decode", "prefill and decode"};
  LogInfo("{} worker on {}: {}, {} KV pages of 64 tokens ({:.0f} MB)",
          kRoleNames[static_cast<int>(worker_options.role)], hosted.worker->address(),
          hosted.engine->Describe(), pages,
          static_cast<double>(hosted.engine->kv_layout().total_bytes()) / 1e6);
  return hosted;
}

}  // namespace millrace::server
