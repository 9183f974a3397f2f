#include "server/cli/host.h"

#include <unistd.h>

#include <chrono>
#include <ctime>
#include <filesystem>

#include "base/digest.h"
#include "base/log.h"
#include "engine/backend/cpu/cpu_backend.h"
#include "engine/backend/cuda/cuda_backend.h"
#include "engine/moe/shm_group.h"
#include "server/cli/ranks.h"
#include "server/group/net_group.h"

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

namespace {

StatusOr<std::shared_ptr<const engine::Weights>> LoadWeights(const engine::Checkpoint& checkpoint,
                                                             const engine::ModelConfig& config,
                                                             const std::string& digest,
                                                             const ModelOptions& options,
                                                             const GroupOptions& group) {
  MR_ASSIGN_OR_RETURN(const engine::Precision precision, engine::ParsePrecision(options.precision));
  if (options.backend == "cuda") {
    if (group.ranks > 1) {
      return InvalidArgument("--ranks {}: expert groups compute on the CPU; --backend cuda is one GPU",
                             group.ranks);
    }
    if (precision != engine::Precision::kBfloat16) {
      return InvalidArgument("--backend cuda computes in bfloat16; --precision {} is for the CPU",
                             options.precision);
    }
    if (options.quantize != "none") {
      return InvalidArgument("--backend cuda keeps weights as they are; --quantize {} is for the CPU",
                             options.quantize);
    }
    engine::CudaWeightsOptions load;
    load.num_threads = options.threads;
    load.progress = LoadBar();
    return engine::LoadCudaWeights(checkpoint, config, load);
  }
  engine::CpuWeightsOptions load;
  load.precision = precision;
  MR_ASSIGN_OR_RETURN(load.quantization, engine::ParseQuantization(options.quantize));
  load.num_threads = options.threads;
  load.progress = LoadBar();
  load.cache_directory = options.weight_cache;
  load.source_digest = digest + checkpoint.files_identity();
  engine::LayerPlacement placement;
  if (group.ranks > 1) {
    if (group.ranks > config.num_experts) {
      return InvalidArgument("--ranks {}: the model has {} experts", group.ranks, config.num_experts);
    }
    placement = engine::InitialPlacement(config.num_experts, group.ranks, group.redundant_experts);
    load.holds = [&placement, rank = group.rank](int32_t, int32_t expert) {
      return (placement[static_cast<size_t>(expert)] >> rank & 1) != 0;
    };
    load.source_digest +=
        fmt::format("|rank {} of {}, {} redundant", group.rank, group.ranks, group.redundant_experts);
  }
  return engine::LoadCpuWeights(checkpoint, config, load);
}

// Whether serving runs the MTP layer: it then has KV pages, which both workers of a hand-over must agree on.
bool UsesMtp(const LoadedModel& model, const ModelOptions& options) {
  return options.backend == "cpu" && options.speculate == "auto" && model.config.num_mtp_layers > 0;
}

// Joins the other ranks; waits until all are there.
StatusOr<std::unique_ptr<engine::ExpertGroup>> JoinGroup(const LoadedModel& model,
                                                         const HostedWorkerOptions& worker,
                                                         const engine::CpuBackendOptions& backend,
                                                         Metrics* metrics) {
  const GroupOptions& options = worker.group;
  const uint64_t digest = Xxh3(AsBytes(model.digest));
  engine::RankGroupOptions join;
  join.rank = options.rank;
  MR_ASSIGN_OR_RETURN(join.shape, engine::CpuGroupShape(*model.weights, backend, options.ranks, digest));
  join.held.assign(
      static_cast<size_t>(join.shape.num_layers),
      engine::InitialPlacement(model.config.num_experts, options.ranks, options.redundant_experts));
  join.stall_max = std::chrono::duration_cast<Duration>(std::chrono::duration<double>(options.stall_max));
  if (options.peers.empty()) {
    LogInfo("rank {} of {}: waiting for the others in {}", options.rank, options.ranks, options.directory);
    return engine::JoinShmGroup(join, options.directory);
  }
  NetGroupOptions net;
  MR_ASSIGN_OR_RETURN(net.peers, GroupPeers(options));
  MR_ASSIGN_OR_RETURN(net.listen, ParseHostPort(worker.listen));
  net.listen.port = net.peers[static_cast<size_t>(options.rank)].port;
  for (const std::string& rail : worker.rails) {
    // The KV rails' addresses, with ports of their own.
    const StatusOr<HostPort> parsed = ParseHostPort(rail);
    net.rails.push_back(parsed.ok() ? HostPort{parsed->host, 0}.ToString() : "auto");
  }
  net.metrics = metrics;
  LogInfo("rank {} of {}: waiting for the others on {}", options.rank, options.ranks, net.listen.ToString());
  return JoinNetGroup(join, net);
}

// A backend with `num_pages` pages over the model's weights. A rank of a group joins it.
StatusOr<std::unique_ptr<engine::Backend>> MakeBackend(const LoadedModel& model, const ModelOptions& options,
                                                       const HostedWorkerOptions& worker, int32_t num_pages,
                                                       Metrics* metrics,
                                                       std::unique_ptr<engine::ExpertGroup>* group) {
  if (options.backend == "cuda") {
    engine::CudaBackendOptions backend;
    backend.num_pages = num_pages;
    backend.batch_tokens_max = options.batch_tokens_max;
    backend.logit_rows_max = options.running_max + engine::kScoredRowsMax;
    return engine::MakeCudaBackend(model.weights, backend);
  }
  engine::CpuBackendOptions backend;
  backend.num_pages = num_pages;
  backend.num_threads = options.threads;
  backend.batch_tokens_max = options.batch_tokens_max;
  backend.logit_rows_max = options.running_max + engine::kScoredRowsMax;
  backend.with_mtp = UsesMtp(model, options);
  MR_ASSIGN_OR_RETURN(backend.isa, engine::ParseIsa(options.isa));
  if (const GroupOptions& group_options = worker.group; group_options.ranks > 1) {
    MR_ASSIGN_OR_RETURN(*group, JoinGroup(model, worker, backend, metrics));
    backend.group.group = group->get();
    backend.group.source = model.checkpoint.get();
    backend.group.slots_per_layer =
        (model.config.num_experts + group_options.ranks - 1) / group_options.ranks +
        group_options.redundant_experts;
    backend.group.rebalance_every =
        std::chrono::duration_cast<Duration>(std::chrono::duration<double>(group_options.rebalance_every));
  }
  return engine::MakeCpuBackend(model.weights, backend);
}

}  // namespace

StatusOr<LoadedModel> LoadModel(const ModelOptions& options, const GroupOptions& group) {
  LoadedModel model;
  MR_ASSIGN_OR_RETURN(model.config, engine::LoadModelConfig(options.model));
  MR_ASSIGN_OR_RETURN(auto checkpoint, engine::Checkpoint::Open(options.model));
  std::vector<std::string> unused;
  MR_RETURN_IF_ERROR(engine::CheckTensors(*checkpoint, &model.config, &unused));
  if (!unused.empty()) LogWarning("{} tensors are not used, e.g. {}", unused.size(), unused.front());
  MR_ASSIGN_OR_RETURN(model.tokenizer, engine::Tokenizer::Load(options.model));
  if (model.tokenizer->size() > model.config.vocab_size) {
    return InvalidArgument("{}/tokenizer.json: {} tokens, but config.json's vocab_size is {}", options.model,
                           model.tokenizer->size(), model.config.vocab_size);
  }
  model.digest = engine::ModelDigest(*checkpoint, model.config);
  MR_ASSIGN_OR_RETURN(model.weights, LoadWeights(*checkpoint, model.config, model.digest, options, group));
  if (group.ranks > 1) model.checkpoint = std::move(checkpoint);
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
  MR_ASSIGN_OR_RETURN(const engine::Precision precision, engine::ParsePrecision(options.precision));
  MR_ASSIGN_OR_RETURN(const size_t kv_bytes, ParseBytes(options.kv_memory));
  engine::KvLayout page;
  const bool with_mtp = UsesMtp(model, options);
  page.num_layers = model.config.num_layers + (with_mtp ? model.config.num_mtp_layers : 0);
  page.num_kv_heads = model.config.num_kv_heads;
  page.head_dim = model.config.head_dim;
  page.dtype = precision == engine::Precision::kFloat32 ? engine::KvDType::kF32 : engine::KvDType::kBf16;
  const size_t pages = kv_bytes / page.page_bytes();
  if (pages < 2 || pages > INT32_MAX) {
    return InvalidArgument("--kv-memory {} holds {} pages of {} bytes; at least 2 are needed",
                           options.kv_memory, pages, page.page_bytes());
  }
  HostedWorker hosted;
  MR_ASSIGN_OR_RETURN(auto backend, MakeBackend(model, options, worker_options, static_cast<int32_t>(pages),
                                                metrics, &hosted.group));
  engine::EngineOptions engine_options;
  engine_options.batch_tokens_max = options.batch_tokens_max;
  engine_options.running_max = options.running_max;
  engine_options.waiting_max = options.waiting_max;
  engine_options.num_vocabulary_tokens = model.tokenizer->size();
  engine_options.prefix_cache = options.prefix_cache == "on";
  engine_options.model_digest = model.digest;
  engine_options.speculate = with_mtp;
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
  service.stall_max = worker_options.stall_max;
  service.metrics = metrics;
  service.spans = worker_options.spans;
  service.peers = worker_options.peers;
  service.tokenizer = model.tokenizer.get();
  service.group = hosted.group.get();
  MR_ASSIGN_OR_RETURN(hosted.worker, Worker::Start(service, hosted.engine.get(), hosted.transfer.get()));
  static constexpr const char* kRoleNames[] = {"prefill", "decode", "prefill and decode"};
  LogInfo("{} worker on {}: {}, {} KV pages of 64 tokens ({:.0f} MB)",
          kRoleNames[static_cast<int>(worker_options.role)], hosted.worker->address(),
          hosted.engine->Describe(), pages,
          static_cast<double>(hosted.engine->kv_layout().total_bytes()) / 1e6);
  return hosted;
}

}  // namespace millrace::server
