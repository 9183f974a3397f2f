#include "server/worker/worker.h"

#include <grpcpp/ext/proto_server_reflection_plugin.h>
#include <grpcpp/grpcpp.h>
#include <grpcpp/health_check_service_interface.h>

#include <vector>

#include "base/log.h"
#include "server/rpc/channel.h"
#include "server/rpc/convert.h"
#include "server/worker/generate_call.h"
#include "server/worker/prefill_call.h"
#include "server/worker/watch_call.h"
#include "server/worker/worker_context.h"

namespace millrace::server {
namespace {

TimePoint Now() { return std::chrono::steady_clock::now(); }

class Service final : public rpc::Worker::CallbackService {
 public:
  explicit Service(WorkerContext* context) : context_(context) {}

  grpc::ServerWriteReactor<rpc::GenerateEvent>* Generate(grpc::CallbackServerContext* /*call*/,
                                                         const rpc::GenerateRequest* request) override {
    return OpenGenerateCall(context_, request);
  }
  grpc::ServerBidiReactor<rpc::PrefillCommand, rpc::PrefillEvent>* Prefill(
      grpc::CallbackServerContext* /*call*/) override {
    return OpenPrefillCall(context_);
  }
  grpc::ServerWriteReactor<rpc::WorkerState>* Watch(grpc::CallbackServerContext* /*call*/,
                                                    const rpc::WatchRequest* /*request*/) override {
    return OpenWatchCall(context_);
  }

 private:
  WorkerContext* const context_;
};

class RunningWorker final : public Worker {
 public:
  RunningWorker(const WorkerOptions& options, engine::Engine* engine, transfer::Transfer* transfer,
                transfer::RegionId region)
      : context_(options, engine, transfer, region), service_(&context_) {}

  ~RunningWorker() override {
    Shutdown(Duration(0));
    if (const Status status = context_.transfer->Deregister(context_.region); !status.ok()) {
      LogError("worker: the KV memory is still in use: {}", Message(status));
    }
  }

  Status Listen() {
    grpc::EnableDefaultHealthCheckService(true);
    grpc::reflection::InitProtoReflectionServerBuilderPlugin();
    grpc::ServerBuilder builder;
    ConfigureServer(&builder);
    builder.RegisterService(&service_);
    MR_ASSIGN_OR_RETURN(server_, StartServer(&builder, context_.options.listen,
                                             grpc::InsecureServerCredentials(), &address_));
    SetHealthy(true);
    return OkStatus();
  }

  std::string address() const override { return address_; }

  void Shutdown(Duration grace) override {
    std::lock_guard lock(shutdown_mutex_);
    if (server_ == nullptr) return;
    SetHealthy(false);
    context_.control.Post([this] { context_.draining = true; });
    context_.active->WaitZero(Now() + grace);
    context_.control.Post([this] { AbortCalls(); });
    // Breaks what has not ended by then, for instance towards a client that does not read.
    server_->Shutdown(std::chrono::system_clock::now() + std::chrono::seconds(1));
    server_->Wait();
    context_.watchers->WaitZero(kNoDeadline);
    while (!context_.active->WaitZero(Now() + std::chrono::seconds(5))) {
      // Only proof that nobody touches the memory ends this wait; the transfer engine gives it when the peer
      // is lost.
      LogWarning("worker: waiting for {} tickets to drain", context_.metrics.open_tickets());
    }
    server_.reset();
  }

 private:
  void SetHealthy(bool healthy) {
    grpc::HealthCheckServiceInterface* const health = server_->GetHealthCheckService();
    health->SetServingStatus("", healthy);
    health->SetServingStatus(rpc::Worker::service_full_name(), healthy);
  }

  void AbortCalls() {
    const std::vector<WorkerCall*> calls(context_.calls.begin(), context_.calls.end());
    for (WorkerCall* call : calls) call->Abort(Unavailable("the worker is shutting down"));
  }

  WorkerContext context_;
  Service service_;
  std::unique_ptr<grpc::Server> server_;
  std::string address_;
  std::mutex shutdown_mutex_;
};

}  // namespace

StatusOr<std::unique_ptr<Worker>> Worker::Start(const WorkerOptions& options, engine::Engine* engine,
                                                transfer::Transfer* transfer) {
  if (options.grant_pages < 1) return InvalidArgument("grant_pages: less than 1");
  if (options.prefill_attempts_max < 1) return InvalidArgument("prefill_attempts_max: less than 1");
  MR_ASSIGN_OR_RETURN(const transfer::RegionId region,
                      transfer->Register(engine->kv_memory(), /*writable=*/true));
  auto worker = std::make_unique<RunningWorker>(options, engine, transfer, region);
  MR_RETURN_IF_ERROR(worker->Listen());
  LogInfo("worker: {} for {} on {}", engine->Describe(), options.model_name, worker->address());
  return std::unique_ptr<Worker>(std::move(worker));
}

}  // namespace millrace::server
