#pragma once
// Gateways and workers of the hand-over simulation: production calls on modelled processes.

#include <functional>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "server/gateway/generation.h"
#include "server/worker/prefill_stream.h"
#include "server/worker/worker_context.h"
#include "tests/sim/model_engine.h"
#include "tests/sim/model_transfer.h"
#include "tests/sim/process.h"

namespace millrace::sim {

namespace rpc = ::millrace::worker::v1;

struct Cluster;

// One incarnation of a worker.
class ModelWorker final : public server::PrefillDialer {
 public:
  ModelWorker(Cluster* cluster, std::string address, int host, uint64_t epoch, server::WorkerRole role,
              int32_t pages);

  void AcceptGenerate(const std::shared_ptr<Rpc>& call, const rpc::GenerateRequest& request,
                      std::shared_ptr<server::GenerateObserver> observer);
  std::shared_ptr<server::PrefillStream> Open(
      server::WorkerContext* context, const std::string& address, TimePoint deadline,
      rpc::PrefillCommand start, std::shared_ptr<server::PrefillStreamObserver> observer) override;
  void AbortAll(const char* why);
  void Die();
  // As the watchdog does it when steps do not end.
  void Stall();
  void GoOn();
  // "" when it serves nobody and holds nothing, else what is left.
  std::string Left();

  Cluster* const cluster;
  const server::WorkerRole role;
  const int32_t pages;
  Process process;
  ModelEngine engine;
  ModelTransfer transfer;
  server::WorkerContext context;
};

// One incarnation of a gateway: what it knows of the workers, and the answers that it follows.
class ModelGateway final : public server::Membership {
 public:
  ModelGateway(Cluster* cluster, std::string address, int host);

  // On its control thread.
  std::shared_ptr<server::Generation> Ask(const server::GenerationRequest& request,
                                          std::function<void(const server::Generation::Event&)> on_event);
  void Die();

  std::vector<server::WorkerSnapshot> Snapshot(const server::CacheQuery& query) const override;
  std::shared_ptr<server::GenerateCall> Generate(const std::string& address,
                                                 const rpc::GenerateRequest& request, TimePoint deadline,
                                                 std::shared_ptr<server::GenerateObserver> observer) override;
  bool Alive(const std::string& address, uint64_t epoch) const override;
  bool CanServe() const override { return true; }

  Cluster* const cluster;
  Process process;
  server::InFlight in_flight;

 private:
  void Look();
  struct Known {
    server::WorkerSnapshot snapshot;
    TimePoint heard;
  };
  std::map<std::string, Known> known_;
  std::vector<std::weak_ptr<server::Generation>> generations_;
};

// What planted mistakes do to requests on their way to a worker.
struct RequestBugs {
  bool without_tokens_so_far = false;
  bool other_seed = false;
};

struct Cluster {
  World* world;
  Random* random;
  Network* network;
  TransferWorld transfers;
  EngineBugs engine_bugs;
  RequestBugs request_bugs;
  int32_t local_prefill_tokens_max = 0;
  uint64_t continued = 0;
  std::vector<std::unique_ptr<ModelWorker>> workers;    // all there ever were, in order
  std::vector<std::unique_ptr<ModelGateway>> gateways;  // likewise
  std::map<std::string, ModelWorker*> current;          // the last one at each address

  ModelWorker* StartWorker(const std::string& address, int host, uint64_t epoch, server::WorkerRole role,
                           int32_t pages);
  ModelGateway* StartGateway(const std::string& address, int host);
};

}  // namespace millrace::sim
