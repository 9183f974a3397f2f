#include "tests/sim/model_cluster.h"

#include <algorithm>
#include <utility>

#include "server/rpc/channel.h"
#include "server/rpc/convert.h"
#include "server/worker/generate_call.h"
#include "server/worker/prefill_call.h"

namespace millrace::sim {

using std::chrono::milliseconds;

namespace {

constexpr Duration kLookEvery = milliseconds(250);
constexpr Duration kSilentMax = std::chrono::seconds(3);  // MembershipOptions::watch_timeout
constexpr Duration kStallMax = std::chrono::seconds(1);

// The server's half of a call.
template <typename Message>
class ServerStream final : public server::CallStream<Message> {
 public:
  ServerStream(std::shared_ptr<Rpc> call, std::function<void(const Message&)> deliver)
      : call_(std::move(call)), deliver_(std::move(deliver)) {}
  void Write(Message message) override {
    call_->Send(Rpc::kServer, [deliver = deliver_, message = std::move(message)] { deliver(message); });
  }
  void Finish(const Status& status) override { call_->Finish(status); }

 private:
  const std::shared_ptr<Rpc> call_;
  const std::function<void(const Message&)> deliver_;
};

class PrefillClient final : public server::PrefillStream {
 public:
  PrefillClient(ModelWorker* server, std::shared_ptr<Rpc> call) : server_(server), call_(std::move(call)) {}
  void Start(rpc::PrefillCommand start, std::shared_ptr<server::PrefillStreamObserver> observer) {
    call_->Send(Rpc::kClient, [server = server_, call = call_, accepted = accepted_, start = std::move(start),
                               observer = std::move(observer)] {
      const auto stream = std::make_shared<ServerStream<rpc::PrefillEvent>>(
          call, [observer](const rpc::PrefillEvent& event) { observer->OnEvent(event); });
      const auto begun = server::PrefillCall::Begin(&server->context, stream);
      *accepted = begun;
      call->OnEnd(Rpc::kServer, [begun](const Status& status) { begun->Abort(status); });
      begun->OnCommand(start);
    });
  }
  void Write(rpc::PrefillCommand command) override {
    call_->Send(Rpc::kClient, [accepted = accepted_, command = std::move(command)] {
      if (const auto to = accepted->lock(); to != nullptr) to->OnCommand(command);
    });
  }
  void Cancel() override { call_->Cancel(Cancelled("cancelled")); }

 private:
  ModelWorker* const server_;
  const std::shared_ptr<Rpc> call_;
  const std::shared_ptr<std::weak_ptr<server::PrefillCall>> accepted_ =
      std::make_shared<std::weak_ptr<server::PrefillCall>>();  // shared with what is on its way
};

class GenerateClient final : public server::GenerateCall {
 public:
  explicit GenerateClient(std::shared_ptr<Rpc> call) : call_(std::move(call)) {}
  void Cancel() override { call_->Cancel(Cancelled("cancelled")); }

 private:
  const std::shared_ptr<Rpc> call_;
};

server::WorkerOptions OptionsOf(server::WorkerRole role) {
  server::WorkerOptions options;
  options.role = role;
  options.model_name = "model";
  options.model_digest = "digest";
  options.grant_pages = 2;
  return options;
}

}  // namespace

ModelWorker::ModelWorker(Cluster* all, std::string address, int host, uint64_t epoch, server::WorkerRole as,
                         int32_t num_pages)
    : cluster(all),
      role(as),
      pages(num_pages),
      process(all->world, all->random, std::move(address), host, epoch),
      engine(&process.engine, all->random, num_pages, all->engine_bugs),
      transfer(&all->transfers, &process, &engine),
      context(OptionsOf(as),
              {.control = &process.control,
               .digest = &process.digest,
               .heartbeat = &process.control,
               .prefill_workers = this,
               .seed = all->random->Next()},
              &engine, &transfer, *transfer.Register(engine.kv_memory(), true)) {}

void ModelWorker::AcceptGenerate(const std::shared_ptr<Rpc>& call, const rpc::GenerateRequest& request,
                                 std::shared_ptr<server::GenerateObserver> observer) {
  const auto stream = std::make_shared<ServerStream<rpc::GenerateEvent>>(
      call, [observer = std::move(observer)](const rpc::GenerateEvent& event) { observer->OnEvent(event); });
  const auto begun = server::BeginGenerate(&context, request, stream);
  call->OnEnd(Rpc::kServer, [begun](const Status& status) { begun->Abort(status); });
}

std::shared_ptr<server::PrefillStream> ModelWorker::Open(
    server::WorkerContext* /*context*/, const std::string& address, TimePoint deadline,
    rpc::PrefillCommand start, std::shared_ptr<server::PrefillStreamObserver> observer) {
  ModelWorker* const to = cluster->current.at(address);
  const auto call =
      cluster->network->Dial(&process, &to->process, to->process.host, deadline,
                             [observer](const Status& status) { observer->OnStreamEnd(status); });
  auto stream = std::make_shared<PrefillClient>(to, call);
  stream->Start(std::move(start), std::move(observer));
  return stream;
}

void ModelWorker::AbortAll(const char* why) {
  process.control.Post([this, why] { server::AbortAll(context.calls, Unavailable("{}", why)); });
}

void ModelWorker::Die() {
  process.dead = true;
  engine.stalled = false;
  process.Thaw();
  cluster->network->OnDeath(&process);
  transfer.OnDeath();
  AbortAll("this process has ended");
}

void ModelWorker::Stall() {
  engine.stalled = true;
  cluster->world->After(kStallMax, [this] {
    if (!engine.stalled) return;
    context.stalled = true;
    AbortAll("the worker computes no further");
  });
}

void ModelWorker::GoOn() { engine.stalled = context.stalled = false; }

std::string ModelWorker::Left() {
  std::string left;
  if (!context.calls.empty()) {
    left = fmt::format("{} calls", context.calls.size());
  } else if (!context.active->WaitZero(TimePoint{})) {
    left = "an attempt or a call that is over";
  } else if (context.metrics.open_tickets() > 0) {
    left = fmt::format("{} tickets", context.metrics.open_tickets());
  } else if (!engine.Left().empty()) {
    left = "engine: " + engine.Left();
  } else if (!transfer.Left().empty()) {
    left = "transfer: " + transfer.Left();
  }
  return left;
}

ModelGateway::ModelGateway(Cluster* all, std::string address, int host)
    : cluster(all),
      process(all->world, all->random, std::move(address), host, all->random->Next()),
      in_flight(&process.control, all->random->Next()) {
  Look();
}

std::shared_ptr<server::Generation> ModelGateway::Ask(
    const server::GenerationRequest& request,
    std::function<void(const server::Generation::Event&)> on_event) {
  server::GenerationOptions options;
  options.local_prefill_tokens_max = cluster->local_prefill_tokens_max;
  // Borrowed: the process outlives it.
  const std::shared_ptr<server::TaskRunner> runner(std::shared_ptr<void>{}, &process.control);
  auto generation =
      server::Generation::Create(runner, *this, in_flight, options, request, std::move(on_event));
  generations_.push_back(generation);
  generation->Start();
  return generation;
}

void ModelGateway::Die() {
  process.dead = true;
  process.Thaw();
  cluster->network->OnDeath(&process);
  process.control.Post([this] {
    for (const auto& weak : generations_) {
      if (const auto generation = weak.lock(); generation != nullptr)
        generation->Cancel(Unavailable("this process has ended"));
    }
  });
}

// What the watch streams bring: a state every so often from whoever lives and is reached.
void ModelGateway::Look() {
  if (process.dead) return;
  for (const auto& [address, worker] : cluster->current) {
    Known& known = known_[address];
    server::WorkerSnapshot& snapshot = known.snapshot;
    const bool reached = cluster->network->Passes(process, worker->process);
    if (reached && !worker->process.dead && !worker->process.frozen) {
      const engine::EngineStats stats = worker->engine.Stats();
      snapshot.address = address;
      snapshot.role = worker->context.role;
      snapshot.connected = true;
      snapshot.ready = worker->context.ready();
      snapshot.stalled = worker->context.stalled;
      snapshot.epoch = worker->process.epoch;
      snapshot.model_digest = worker->context.options.model_digest;
      snapshot.layout_hash = worker->context.layout_hash;
      snapshot.protocol_version = server::kProtocolVersion;
      snapshot.pages_total = stats.pages_total;
      snapshot.pages_free = stats.pages_free;
      snapshot.waiting = stats.waiting;
      snapshot.running = stats.running;
      snapshot.avoids = worker->context.prefill_health.Avoided();
      known.heard = process.control.Now();
    } else if ((reached && worker->process.dead) || process.control.Now() - known.heard >= kSilentMax) {
      snapshot.connected = false;
    }
  }
  process.control.PostAt(process.control.Now() + kLookEvery, [this] { Look(); });
}

std::vector<server::WorkerSnapshot> ModelGateway::Snapshot(const server::CacheQuery& /*query*/) const {
  std::vector<server::WorkerSnapshot> all;
  for (const auto& [address, known] : known_) {
    all.push_back(known.snapshot);
    all.back().silent = process.control.Now() - known.heard;
  }
  return all;
}

bool ModelGateway::Alive(const std::string& address, uint64_t epoch) const {
  const server::WorkerSnapshot& snapshot = known_.at(address).snapshot;
  return snapshot.connected && snapshot.epoch == epoch && !snapshot.stalled;
}

std::shared_ptr<server::GenerateCall> ModelGateway::Generate(
    const std::string& address, const rpc::GenerateRequest& request, TimePoint deadline,
    std::shared_ptr<server::GenerateObserver> observer) {
  ModelWorker* const to = cluster->current.at(address);
  rpc::GenerateRequest sent = request;
  if (request.output_size() > 0) {
    ++cluster->continued;
    if (cluster->request_bugs.without_tokens_so_far) sent.clear_output();
    if (cluster->request_bugs.other_seed) sent.mutable_sampling()->set_seed(request.sampling().seed() + 1);
  }
  const auto call =
      cluster->network->Dial(&process, &to->process, to->process.host, deadline,
                             [observer](const Status& status) { observer->OnDone(server::ToGrpc(status)); });
  call->Send(Rpc::kClient, [to, call, sent, observer] { to->AcceptGenerate(call, sent, observer); });
  return std::make_shared<GenerateClient>(call);
}

ModelWorker* Cluster::StartWorker(const std::string& address, int host, uint64_t epoch,
                                  server::WorkerRole role, int32_t pages) {
  workers.push_back(std::make_unique<ModelWorker>(this, address, host, epoch, role, pages));
  return current[address] = workers.back().get();
}

ModelGateway* Cluster::StartGateway(const std::string& address, int host) {
  gateways.push_back(std::make_unique<ModelGateway>(this, address, host));
  return gateways.back().get();
}

}  // namespace millrace::sim
