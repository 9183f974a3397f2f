#pragma once
// What a serving process owns: the model, and workers on top of it. Built in order, torn down in reverse.

#include <memory>
#include <string>

#include "base/metrics.h"
#include "engine/backend/backend.h"
#include "engine/core/engine.h"
#include "engine/model/checkpoint.h"
#include "engine/moe/expert_group.h"
#include "engine/tokenizer/tokenizer.h"
#include "server/cli/options.h"
#include "server/gateway/api_request.h"
#include "server/worker/worker.h"
#include "transfer/transfer.h"

namespace millrace::server {

// The model in memory, shared by the engines of this process.
struct LoadedModel {
  engine::ModelConfig config;
  std::shared_ptr<const engine::Weights> weights;
  std::unique_ptr<engine::Tokenizer> tokenizer;
  std::unique_ptr<engine::Checkpoint> checkpoint;  // kept by a rank of a group: experts may move to it
  std::string name;
  std::string digest;
};

// Loads and checks everything under options.model, with a progress bar on a terminal. Errors name the file.
// A rank of a group loads its part of the experts only.
StatusOr<LoadedModel> LoadModel(const ModelOptions& options, const GroupOptions& group = {});

// The directory's own name, or `name` when given.
std::string ModelName(const std::string& directory, const std::string& name);

// What the HTTP edge needs to know of a checkpoint, without its weights.
StatusOr<ModelInfo> DescribeModel(const std::string& directory, const std::string& name);

// One engine, its rails and its gRPC service. Members go in reverse order: the service first, memory last.
struct HostedWorker {
  std::unique_ptr<engine::ExpertGroup> group;  // null for a worker by itself
  std::unique_ptr<engine::Engine> engine;
  std::unique_ptr<transfer::Transfer> transfer;
  std::unique_ptr<Worker> worker;
};

struct HostedWorkerOptions {
  WorkerRole role = WorkerRole::kBoth;
  std::string listen = "127.0.0.1:0";
  std::vector<std::string> rails;  // empty: reachable within this process only
  int32_t grant_pages = 8;
  Duration stall_max = WorkerOptions().stall_max;
  GroupOptions group;
  PeerCredentials peers;
  SpanSink* spans = nullptr;  // may be null; outlives the worker
};

StatusOr<HostedWorker> StartWorker(const LoadedModel& model, const ModelOptions& options,
                                   const HostedWorkerOptions& worker_options, Metrics* metrics);

}  // namespace millrace::server
