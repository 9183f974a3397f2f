// serve, gateway and worker: build what the role needs, wait for a signal, tear down in order.
#include <prometheus/exposer.h>
#include <pthread.h>
#include <signal.h>
#include <sys/resource.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <span>

#include "base/log.h"
#include "base/net.h"
#include "server/cli/commands.h"
#include "server/cli/host.h"
#include "server/cli/ranks.h"
#include "server/gateway/gateway.h"
#include "server/gateway/vllm_names.h"
#include "server/router/membership.h"
#include "server/rpc/convert.h"
#include "server/trace/otlp_exporter.h"

namespace millrace::server {
namespace {

int Fail(const Status& status) {
  fmt::print(stderr, "millrace: {}\n", Message(status));
  return 1;
}

// What comes after the time that running work gets: hanging up, waiting until no peer can touch the memory.
// Past it the process ends all the same; the kernel then takes its memory and connections away, which is the
// same proof.
constexpr int kEndSeconds = 30;

void EndNow(int /*signal*/) {
  static constexpr char kSaid[] = "millrace: did not end in time after its drain; ending at once\n";
  (void)!write(STDERR_FILENO, kSaid, sizeof(kSaid) - 1);
  _exit(3);
}

// Blocks the signals that end a server, in this thread and all that it starts, so that WaitForSignal gets
// them.
class Signals {
 public:
  Signals() {
    sigemptyset(&set_);
    sigaddset(&set_, SIGINT);
    sigaddset(&set_, SIGTERM);
    pthread_sigmask(SIG_BLOCK, &set_, nullptr);
    signal(SIGPIPE, SIG_IGN);
  }
  // Until a signal comes, or one of the workers' engines has failed: only a new process computes again, and
  // whoever started this one is told by its exit code. A second signal ends the process at once, and so does
  // the clock when `drain` seconds and kEndSeconds more have gone by.
  Status Wait(double drain, std::span<const HostedWorker> workers = {}) {
    constexpr timespec kLook = {0, 200'000'000};
    int number = -1;
    while (number < 0) {
      number = sigtimedwait(&set_, nullptr, &kLook);
      for (const HostedWorker& hosted : workers) {
        if (!hosted.engine->MakingProgress(Duration::max()))
          return Internal("the engine has failed: see the log");
      }
    }
    LogInfo("signal {}: draining", number == SIGINT ? "SIGINT" : "SIGTERM");
    signal(SIGINT, SIG_DFL);
    signal(SIGTERM, SIG_DFL);
    pthread_sigmask(SIG_UNBLOCK, &set_, nullptr);
    signal(SIGALRM, EndNow);
    alarm(static_cast<unsigned>(std::ceil(drain)) + kEndSeconds);
    return OkStatus();
  }

 private:
  sigset_t set_{};
};

Duration FromSeconds(double seconds) {
  return std::chrono::duration_cast<Duration>(std::chrono::duration<double>(seconds));
}

// A connection takes a file, and the usual soft limit of 1024 is there for programs that use select(): this
// one takes what the hard limit allows.
void RaiseFileLimit(int32_t connections_max) {
  constexpr rlim_t kOthers = 256;  // model, workers, listeners, logs
  rlimit limit{};
  if (getrlimit(RLIMIT_NOFILE, &limit) != 0) return;
  limit.rlim_cur = limit.rlim_max;
  setrlimit(RLIMIT_NOFILE, &limit);
  if (limit.rlim_cur < static_cast<rlim_t>(connections_max) + kOthers)
    LogWarning("this process may open {} files: fewer than --connections-max {} needs", limit.rlim_cur,
               connections_max);
}

// Null when spans go nowhere.
StatusOr<std::unique_ptr<OtlpExporter>> StartTraces(const TraceOptions& trace, const std::string& service,
                                                    Metrics* metrics) {
  if (trace.endpoint.empty()) return std::unique_ptr<OtlpExporter>();
  OtlpOptions options;
  options.endpoint = trace.endpoint;
  options.service_name = service;
  options.service_version = MILLRACE_VERSION;
  return OtlpExporter::Start(options, *metrics);
}

GatewayOptions MakeGatewayOptions(const HttpOptions& http, const Tracing& tracing,
                                  const std::string& effective) {
  GatewayOptions options;
  options.tracing = tracing;
  options.effective = effective;
  options.admin_listen = http.admin_listen;
  options.grpc_listen = http.grpc_listen;
  options.api_keys = http.api_keys;
  options.tls = {http.tls_cert, http.tls_key, http.tls_client_ca};
  options.cors_origins = http.cors_origins;
  options.admission.running_max = http.requests_max;
  options.admission.queue_max = http.queue_max;
  options.vllm_metrics = http.vllm_metrics == "on";
  options.listen = http.listen;
  options.threads = http.http_threads;
  options.connections_max = http.connections_max;
  options.request_timeout = FromSeconds(http.request_timeout);
  options.keepalive = FromSeconds(http.keepalive);
  options.generation.local_prefill_tokens_max = http.local_prefill_tokens_max;
  return options;
}

const char* Scheme(const HttpOptions& http) { return http.tls_cert.empty() ? "http" : "https"; }

void SayWhere(const Gateway& gateway, const HttpOptions& http, const std::string& model) {
  fmt::print("Millrace serves {} at {}://{}\n", model, Scheme(http), gateway.address());
  if (!gateway.grpc_address().empty()) fmt::print("  gRPC: {}\n", gateway.grpc_address());
}

void DescribeBuild(const std::string& role, Metrics* metrics, MetricLabels more = {}) {
  more.insert({{"version", MILLRACE_VERSION}, {"role", role}});
  metrics
      ->Gauge("millrace_build_info",
              "1; what this process is. Workers hand over to each other if protocol, model_digest and "
              "kv_layout are the same.",
              more)
      .Set(1);
}

void DescribeEngine(const std::string& role, bool vllm_names, const LoadedModel& loaded,
                    const engine::Engine& engine, Metrics* metrics) {
  const std::string& model = loaded.name;
  DescribeBuild(role, metrics,
                {{"model", model},
                 {"model_digest", loaded.digest},
                 {"kv_layout", fmt::format("{:016x}", engine.kv_layout().CompatibilityHash())},
                 {"protocol", std::to_string(kProtocolVersion)}});
  if (!vllm_names) return;
  // Its values are labels, so that it is no other metric under another name.
  metrics
      ->Gauge("vllm:cache_config_info", "1; the size of the KV cache.",
              {{"block_size", std::to_string(engine::kPageTokens)},
               {"num_gpu_blocks", std::to_string(engine.kv_layout().num_pages)},
               {"model_name", model},
               {"engine", "0"}})
      .Set(1);
}

// Serves /metrics at `listen`, or nothing when it is empty. civetweb throws when it cannot bind.
StatusOr<std::unique_ptr<prometheus::Exposer>> ExposeMetrics(
    const std::string& listen, const std::vector<std::shared_ptr<prometheus::Collectable>>& sources) {
  if (listen.empty()) return std::unique_ptr<prometheus::Exposer>();
  MR_RETURN_IF_ERROR(ParseHostPort(listen).status());
  try {
    auto exposer = std::make_unique<prometheus::Exposer>(listen, 1);
    for (const auto& source : sources) exposer->RegisterCollectable(source);
    return exposer;
  } catch (const std::exception& error) {
    return Unavailable("cannot serve metrics on {}: {}", listen, error.what());
  }
}

Status Serve(const ServeOptions& options, const std::string& effective) {
  MR_RETURN_IF_ERROR(ConfigureLog(options.log));
  TakeOverGrpcLog();
  LogInfo("{}", effective);
  RaiseFileLimit(options.http.connections_max);
  Signals signals;
  Metrics metrics;
  MR_ASSIGN_OR_RETURN(const auto traces, StartTraces(options.trace, "millrace", &metrics));
  MR_ASSIGN_OR_RETURN(const LoadedModel model, LoadModel(options.model));
  MR_ASSIGN_OR_RETURN(const ModelInfo info, DescribeModel(options.model.model, options.model.model_name));

  // Two engines in one process have the same metrics, told apart by their role.
  Metrics of_prefill = metrics.With({{"role", "prefill"}});
  Metrics of_decode = metrics.With({{"role", "decode"}});
  std::vector<HostedWorker> workers;
  const auto roles = options.aggregated ? std::vector{WorkerRole::kBoth}
                                        : std::vector{WorkerRole::kPrefill, WorkerRole::kDecode};
  const bool vllm_names = options.http.vllm_metrics == "on";
  MembershipOptions members;
  for (const WorkerRole role : roles) {
    HostedWorkerOptions worker;
    worker.role = role;
    worker.spans = traces.get();
    worker.stall_max = FromSeconds(options.stall_max);
    Metrics* const own = role == WorkerRole::kPrefill  ? &of_prefill
                         : role == WorkerRole::kDecode ? &of_decode
                                                       : &metrics;
    MR_ASSIGN_OR_RETURN(HostedWorker hosted, StartWorker(model, options.model, worker, own));
    members.workers.push_back(hosted.worker->address());
    DescribeEngine("serve", vllm_names, model, *hosted.engine, own);
    workers.push_back(std::move(hosted));
  }
  MR_ASSIGN_OR_RETURN(const auto membership, Membership::Create(members));
  GatewayOptions edge = MakeGatewayOptions(options.http, {traces.get(), options.trace.sample}, effective);
  edge.hosts_workers = true;
  MR_ASSIGN_OR_RETURN(const auto gateway, Gateway::Start(edge, info, *model.tokenizer, *membership, metrics));
  SayWhere(*gateway, options.http, info.name);
  fmt::print(
      "  try: curl http://{}/v1/chat/completions -H 'content-type: application/json' -d "
      "'{{\"model\":\"{}\",\"messages\":[{{\"role\":\"user\",\"content\":\"What is a violin?\"}}]}}'\n",
      gateway->address(), info.name);
  fmt::print("  or:  millrace chat --url http://{}\n", gateway->address());
  std::fflush(stdout);
  MR_RETURN_IF_ERROR(signals.Wait(options.drain, workers));
  gateway->Shutdown(FromSeconds(options.drain));
  for (HostedWorker& hosted : workers) hosted.worker->Shutdown(Duration::zero());
  return OkStatus();
}

Status ServeGateway(const GatewayCommandOptions& options, const std::string& effective) {
  MR_RETURN_IF_ERROR(ConfigureLog(options.log));
  TakeOverGrpcLog();
  LogInfo("{}", effective);
  RaiseFileLimit(options.http.connections_max);
  Signals signals;
  Metrics metrics;
  MR_ASSIGN_OR_RETURN(const auto traces, StartTraces(options.trace, "millrace-gateway", &metrics));
  MR_ASSIGN_OR_RETURN(const ModelInfo info, DescribeModel(options.model, options.model_name));
  MR_ASSIGN_OR_RETURN(const auto tokenizer, engine::Tokenizer::Load(options.model));
  DescribeBuild("gateway", &metrics);
  MR_ASSIGN_OR_RETURN(const PeerCredentials peers,
                      MakePeerCredentials({options.peer.ca, options.peer.cert, options.peer.key}));
  MembershipOptions members;
  members.credentials = peers.channel;
  members.workers = options.decode;
  members.workers.insert(members.workers.end(), options.prefill.begin(), options.prefill.end());
  std::sort(members.workers.begin(), members.workers.end());
  members.workers.erase(std::unique(members.workers.begin(), members.workers.end()), members.workers.end());
  MR_ASSIGN_OR_RETURN(const auto membership, Membership::Create(members));
  MR_ASSIGN_OR_RETURN(
      const auto gateway,
      Gateway::Start(MakeGatewayOptions(options.http, {traces.get(), options.trace.sample}, effective), info,
                     *tokenizer, *membership, metrics));
  SayWhere(*gateway, options.http, info.name);
  std::fflush(stdout);
  MR_RETURN_IF_ERROR(signals.Wait(options.drain));
  gateway->Shutdown(FromSeconds(options.drain));
  return OkStatus();
}

Status ServeWorker(const WorkerCommandOptions& options, const std::string& effective) {
  MR_RETURN_IF_ERROR(ConfigureLog(options.log));
  TakeOverGrpcLog();
  LogInfo("{}", effective);
  Signals signals;
  Metrics metrics;
  MR_ASSIGN_OR_RETURN(
      const auto traces,
      StartTraces(options.trace, "millrace-" + (options.role == "both" ? "worker" : options.role), &metrics));
  HostedWorkerOptions worker;
  worker.group = options.group;
  MR_ASSIGN_OR_RETURN(worker.peers,
                      MakePeerCredentials({options.peer.ca, options.peer.cert, options.peer.key}));
  MR_ASSIGN_OR_RETURN(const LoadedModel model, LoadModel(options.model, options.group));
  worker.role = options.role == "prefill"  ? WorkerRole::kPrefill
                : options.role == "decode" ? WorkerRole::kDecode
                                           : WorkerRole::kBoth;
  worker.listen = options.listen;
  worker.spans = traces.get();
  worker.grant_pages = options.grant_pages;
  worker.stall_max = FromSeconds(options.stall_max);
  MR_ASSIGN_OR_RETURN(const HostPort listen, ParseHostPort(options.listen));
  const std::vector<std::string> rails = options.rails.empty() ? std::vector{listen.host} : options.rails;
  for (const std::string& rail : rails) {
    // Port 0 of a rail is any free one: peers learn it from the descriptor.
    const bool bare = rail.find(':') == std::string::npos || (rail.front() == '[' && rail.back() == ']');
    worker.rails.push_back(bare ? rail + ":0" : rail);
  }
  MR_ASSIGN_OR_RETURN(HostedWorker hosted, StartWorker(model, options.model, worker, &metrics));
  DescribeEngine(options.role, options.vllm_metrics == "on", model, *hosted.engine, &metrics);
  std::vector<std::shared_ptr<prometheus::Collectable>> sources = {metrics.collectable()};
  if (options.vllm_metrics == "on")
    sources.push_back(std::make_shared<VllmNames>(metrics.collectable(), model.name));
  MR_ASSIGN_OR_RETURN(const auto exposer, ExposeMetrics(options.metrics_listen, sources));
  fmt::print("Millrace {} worker of {} on {}\n", options.role, model.name, hosted.worker->address());
  std::fflush(stdout);
  MR_RETURN_IF_ERROR(signals.Wait(options.drain, {&hosted, 1}));
  hosted.worker->Shutdown(FromSeconds(options.drain));
  return OkStatus();
}

}  // namespace

int RunServe(const ServeOptions& options, const std::string& effective) {
  const Status status = Serve(options, effective);
  return status.ok() ? 0 : Fail(status);
}

int RunGateway(const GatewayCommandOptions& options, const std::string& effective) {
  const Status status = ServeGateway(options, effective);
  return status.ok() ? 0 : Fail(status);
}

int RunWorker(const WorkerCommandOptions& options, const std::string& effective) {
  const GroupOptions& group = options.group;
  if (group.rank >= group.ranks)
    return Fail(InvalidArgument("--rank {}: with --ranks {} it is 0 to {}", group.rank, group.ranks,
                                group.ranks - 1));
  if (!group.peers.empty()) {
    if (const auto peers = GroupPeers(group); !peers.ok()) return Fail(peers.status());
  } else if (group.ranks > 1 && group.rank >= 0 && group.directory.empty()) {
    return Fail(InvalidArgument("--rank needs --group-directory or --group-peers, the same for all ranks"));
  }
  const auto serve = [&](const WorkerCommandOptions& rank) { return ServeWorker(rank, effective); };
  const Status status = group.ranks > 1 && group.rank < 0 ? RunRanks(options, serve) : serve(options);
  return status.ok() ? 0 : Fail(status);
}

}  // namespace millrace::server
