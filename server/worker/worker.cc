#include "server/worker/worker.h"

#include <grpcpp/ext/proto_server_reflection_plugin.h>
#include <grpcpp/grpcpp.h>
#include <grpcpp/health_check_service_interface.h>

#include <future>

#include "base/log.h"
#include "base/net.h"
#include "server/rpc/channel.h"
#include "server/rpc/convert.h"
#include "server/rpc/task_thread.h"
#include "server/worker/prefill_stream.h"
#include "server/worker/reactors.h"
#include "server/worker/watch_call.h"
#include "server/worker/worker_context.h"

namespace millrace::server {
namespace {

constexpr Duration kLookEvery = std::chrono::milliseconds(250);

TimePoint Now() { return std::chrono::steady_clock::now(); }

// An idle worker takes another role. Control thread.
Status SetRole(WorkerContext* context, rpc::Role role) {
  if (!rpc::Role_IsValid(role) || role == rpc::ROLE_UNSPECIFIED) return InvalidArgument("role: unknown");
  if (context->draining) return Unavailable("the worker is shutting down");
  const engine::EngineStats stats = context->engine->Stats();
  if (!context->calls.empty() || stats.waiting + stats.running + stats.tickets > 0) {
    return FailedPrecondition(
        "the worker serves {} calls and holds {} tickets; its role changes when it is idle",
        context->calls.size(), stats.tickets);
  }
  context->role = role == rpc::PREFILL  ? WorkerRole::kPrefill
                  : role == rpc::DECODE ? WorkerRole::kDecode
                                        : WorkerRole::kBoth;
  LogInfo("worker: its role is {} now", rpc::Role_Name(role));
  return OkStatus();
}

class Service final : public rpc::Worker::CallbackService {
 public:
  explicit Service(WorkerContext* context) : context_(context) {}

  grpc::ServerWriteReactor<rpc::GenerateEvent>* Generate(grpc::CallbackServerContext* /*call*/,
                                                         const rpc::GenerateRequest* request) override {
    return OpenGenerate(context_, *request);
  }
  grpc::ServerBidiReactor<rpc::PrefillCommand, rpc::PrefillEvent>* Prefill(
      grpc::CallbackServerContext* /*call*/) override {
    return OpenPrefill(context_);
  }
  grpc::ServerWriteReactor<rpc::WorkerState>* Watch(grpc::CallbackServerContext* /*call*/,
                                                    const rpc::WatchRequest* /*request*/) override {
    return OpenWatchCall(context_);
  }
  grpc::ServerUnaryReactor* SetRole(grpc::CallbackServerContext* call, const rpc::SetRoleRequest* request,
                                    rpc::SetRoleReply* /*reply*/) override {
    grpc::ServerUnaryReactor* const reactor = call->DefaultReactor();
    context_->control.Post([this, reactor, role = request->role()] {
      reactor->Finish(ToGrpc(server::SetRole(context_, role)));
    });
    return reactor;
  }

 private:
  WorkerContext* const context_;
};

class RunningWorker final : public Worker {
 public:
  RunningWorker(const WorkerOptions& options, engine::Engine* engine, transfer::Transfer* transfer,
                transfer::RegionId region)
      : prefill_workers_(MakePrefillDialer(options.peers.channel)),
        context_(options,
                 {.control = &control_,
                  .digest = &digest_,
                  .heartbeat = &heartbeat_,
                  .prefill_workers = prefill_workers_.get()},
                 engine, transfer, region),
        service_(&context_) {}

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
    MR_ASSIGN_OR_RETURN(
        server_, StartServer(&builder, context_.options.listen, context_.options.peers.server, &address_));
    SetHealthy();
    // Watchers of one rank find the others.
    if (engine::ExpertGroup* const group = context_.options.group; group != nullptr) {
      MR_ASSIGN_OR_RETURN(const HostPort bound, ParseHostPort(address_));
      group->Announce(static_cast<uint32_t>(bound.port));
    }
    control_answered_ = Now();
    context_.heartbeat.Post([this] { Look(); });
    return OkStatus();
  }

  std::string address() const override { return address_; }

  void Shutdown(Duration grace) override {
    std::lock_guard lock(shutdown_mutex_);
    if (server_ == nullptr) return;
    context_.draining = true;
    SetHealthy();
    context_.active->WaitZero(Now() + grace);
    context_.control.Post([this] { AbortAll(context_.calls, Unavailable("the worker is shutting down")); });
    std::promise<void> not_looking;  // the watchdog uses the server
    context_.heartbeat.Post([this, &not_looking] {
      looking_ = false;
      AbortAll(context_.watch_calls, Unavailable("the worker is shutting down"));
      not_looking.set_value();
    });
    not_looking.get_future().wait();
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
  void SetHealthy() {
    grpc::HealthCheckServiceInterface* const health = server_->GetHealthCheckService();
    health->SetServingStatus("", context_.ready());
    health->SetServingStatus(rpc::Worker::service_full_name(), context_.ready());
  }

  // The watchdog, on the heartbeat thread: steps end, and the control thread answers.
  void Look() {
    if (!looking_) return;
    const TimePoint now = Now();
    if (!control_asked_) {
      control_asked_ = true;
      context_.control.Post([this] {
        // At each look, not once: a call may have come in between.
        if (context_.stalled) AbortAll(context_.calls, Unavailable("the worker computes no further"));
        context_.heartbeat.Post([this] {
          control_asked_ = false;
          control_answered_ = Now();
        });
      });
    }
    if (context_.group != nullptr) context_.group->Look(now);
    const Duration stall_max = context_.options.stall_max;
    const bool engine_stalled = !context_.engine->MakingProgress(stall_max);
    const bool stalled = engine_stalled || now - control_answered_ > stall_max;
    if (stalled != context_.stalled) {
      context_.stalled = stalled;
      SetHealthy();
      LogWarning("worker: {}", !stalled         ? "computes again"
                               : engine_stalled ? "the engine's step does not end"
                                                : "the control thread does not answer");
    }
    context_.heartbeat.PostAt(now + kLookEvery, [this] { Look(); });
  }

  const std::unique_ptr<PrefillDialer> prefill_workers_;
  WorkerContext context_;
  Service service_;
  std::unique_ptr<grpc::Server> server_;
  std::string address_;
  std::mutex shutdown_mutex_;

  // Heartbeat thread.
  bool looking_ = true;
  bool control_asked_ = false;
  TimePoint control_answered_;

  TaskThread digest_{"digest"};
  TaskThread heartbeat_{"heartbeat"};
  TaskThread control_{"worker"};  // last, so that it ends first
};

}  // namespace

StatusOr<std::unique_ptr<Worker>> Worker::Start(const WorkerOptions& options, engine::Engine* engine,
                                                transfer::Transfer* transfer) {
  if (options.stall_max <= Duration(0)) return InvalidArgument("stall_max: not positive");
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
