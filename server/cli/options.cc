#include "server/cli/options.h"

#include <charconv>
#include <sstream>

#include "base/json.h"
#include "engine/moe/shm_group.h"

namespace millrace::server {
namespace {

// CLI11 reads INI by itself; this makes --config a JSON object whose keys are the flags of the command that
// was given.
class JsonConfig : public CLI::Config {
 public:
  explicit JsonConfig(const CLI::App* app) : app_(app) {}

  std::string to_config(const CLI::App*, bool, bool, std::string) const override { return ""; }

  std::vector<CLI::ConfigItem> from_config(std::istream& input) const override {
    std::stringstream text;
    text << input.rdbuf();
    const auto parsed = ParseOrderedJson(text.str());
    if (!parsed.ok()) throw CLI::ConfigError("configuration file: " + std::string(Message(parsed.status())));
    if (!parsed->is_object()) throw CLI::ConfigError("configuration file: a JSON object is expected");
    std::vector<CLI::ConfigItem> entries;
    for (const auto& [key, value] : parsed->items()) {
      CLI::ConfigItem item;
      item.name = key;
      item.parents = {app_->get_subcommands().front()->get_name()};
      for (const auto& entry : value.is_array() ? value : OrderedJson::array({value})) {
        if (entry.is_object() || entry.is_array() || entry.is_null()) {
          throw CLI::ConfigError("configuration file: '" + key +
                                 "' must be a string, a number, a boolean or a list of them");
        }
        item.inputs.push_back(entry.is_string() ? entry.get<std::string>() : entry.dump());
      }
      entries.push_back(std::move(item));
    }
    return entries;
  }

 private:
  const CLI::App* const app_;
};

CLI::App* AddCommand(CLI::App& app, const char* name, const char* description) {
  CLI::App* command = app.add_subcommand(name, description);
  command->fallthrough();  // so that --config may follow the command
  command->get_formatter()->column_width(34);
  command->footer("");
  return command;
}

// What every command that serves takes.
void AddHosting(CLI::App* command, LogOptions& log) {
  command->footer(
      "--config FILE takes the same from a JSON object whose keys are these flags without the dashes. Flags "
      "on\n"
      "the command line win; unknown keys are refused.");
  command->add_option("--log-level", log.level, "trace, debug, info, warn, error or off")
      ->capture_default_str();
  command->add_option("--log-format", log.format, "text, or json: one object per line")
      ->capture_default_str();
}

void AddModel(CLI::App* command, ModelOptions& model) {
  command
      ->add_option("--model", model.model, "Checkpoint directory: config.json, tokenizer.json, *.safetensors")
      ->required();
  command->add_option("--model-name", model.model_name,
                      "Name that clients use (default: the directory's name)");
  command->add_option("--backend", model.backend, "What computes: cpu, or cuda (one Hopper GPU, bfloat16)")
      ->check(CLI::IsMember({"cpu", "cuda"}))
      ->capture_default_str();
  command->add_option("--precision", model.precision, "Weights and KV cache: bfloat16 or float32")
      ->capture_default_str();
  command
      ->add_option(
          "--quantize", model.quantize,
          "Matrices in integers: none, int8 or int4; made at load from whatever the checkpoint holds")
      ->capture_default_str();
  command->add_option("--weight-cache", model.weight_cache,
                      "Directory that keeps packed weights for the next start (default: none)");
  command->add_option("--isa", model.isa, "Kernels: auto, portable, avx2, avx512 or amx")
      ->capture_default_str();
  command->add_option("--threads", model.threads, "Compute threads per engine; 0 = every processor")
      ->capture_default_str();
  command->add_option("--kv-memory", model.kv_memory, "Memory for KV pages per engine, e.g. 512MiB or 8GiB")
      ->capture_default_str();
  command
      ->add_option("--batch-tokens-max", model.batch_tokens_max,
                   "Tokens in one step (prefill chunk and decode together)")
      ->check(CLI::Range(65, 65536))
      ->capture_default_str();
  command->add_option("--running-max", model.running_max, "Requests decoding at once")
      ->check(CLI::Range(1, 4096))
      ->capture_default_str();
  command->add_option("--waiting-max", model.waiting_max, "Requests queued; one more is answered 429")
      ->check(CLI::Range(1, 1 << 20))
      ->capture_default_str();
  command
      ->add_option("--prefix-cache", model.prefix_cache,
                   "on: keep the KV of full pages for requests that begin alike; off: compute every prompt")
      ->check(CLI::IsMember({"on", "off"}))
      ->capture_default_str();
  command
      ->add_option("--kv-host-memory", model.kv_host_memory,
                   "Host memory for cached KV pages that leave --kv-memory, e.g. 4GiB; 0 = none")
      ->capture_default_str();
  command
      ->add_option("--kv-disk-size", model.kv_disk_size,
                   "Size of a file for cached KV pages that leave --kv-host-memory; 0 = none")
      ->capture_default_str();
  command
      ->add_option("--kv-disk-directory", model.kv_disk_directory,
                   "Where that file is; it has no name and is gone when the process ends")
      ->capture_default_str();
  command
      ->add_option(
          "--token-gap-ms", model.token_gap_ms,
          "Milliseconds that an answer should wait at most between two tokens while prompts are computed; "
          "0 = any time")
      ->check(CLI::NonNegativeNumber)
      ->capture_default_str();
  command
      ->add_option(
          "--speculate", model.speculate,
          "auto: let the checkpoint's MTP layer, if any, propose tokens where that is faster; off: never. "
          "The same on prefill and decode workers")
      ->check(CLI::IsMember({"auto", "off"}))
      ->capture_default_str();
}

void AddGroup(CLI::App* command, GroupOptions& group) {
  command
      ->add_option(
          "--ranks", group.ranks,
          "Hold the model in so many processes: each has requests and KV pages of its own and a part of "
          "the experts. Rank i listens on the ports of --listen and --metrics-listen plus i; a gateway "
          "needs the address of one")
      ->check(CLI::Range(1, engine::kGroupRanksMax))
      ->capture_default_str();
  command
      ->add_option("--rank", group.rank,
                   "Be this one of --ranks, on the ports as they are given (default: start all of them here, "
                   "and start "
                   "again what ends)")
      ->check(CLI::Range(0, engine::kGroupRanksMax - 1));
  command->add_option(
      "--group-directory", group.directory,
      "Directory on tmpfs through which the ranks exchange rows; needed with --rank (default: one of "
      "its own in /dev/shm)");
  command
      ->add_option("--group-peers", group.peers,
                   "Ranks on several hosts: HOST:PORT of each, in order, the same list for all; with --rank. "
                   "Rank i takes its own port on --listen's host. Rank 0's address alone: rank i is at the "
                   "same name with -i behind its first label, as LeaderWorkerSet names its pods. A network "
                   "for the ranks alone: not encrypted")
      ->delimiter(',');
  command
      ->add_option("--redundant-experts", group.redundant_experts,
                   "Experts per layer that each rank holds beyond its share: copies of busy ones, and what a "
                   "lost rank "
                   "had")
      ->check(CLI::NonNegativeNumber)
      ->capture_default_str();
  command
      ->add_option("--rebalance-every", group.rebalance_every,
                   "Seconds between two looks whether the ranks' load can be more even; 0 = never")
      ->check(CLI::NonNegativeNumber)
      ->capture_default_str();
  command
      ->add_option("--rank-stall-max", group.stall_max,
                   "Seconds that the others wait for a rank's part of a step until they go on without it")
      ->check(CLI::PositiveNumber)
      ->capture_default_str();
}

void AddStallMax(CLI::App* command, double& seconds) {
  command
      ->add_option("--stall-max", seconds,
                   "Seconds that one step may take until the worker gives up what it runs")
      ->capture_default_str()
      ->check(CLI::PositiveNumber);
}

void AddVllmMetrics(CLI::App* command, std::string& choice) {
  command
      ->add_option("--vllm-metrics", choice,
                   "on: /metrics also has what vLLM has, under its names and buckets (vllm:...); off: "
                   "millrace_... only")
      ->check(CLI::IsMember({"on", "off"}))
      ->capture_default_str();
}

void AddPeerTls(CLI::App* command, PeerTlsCommandOptions& peer) {
  command->add_option("--peer-ca", peer.ca,
                      "PEM authorities: gateways and workers speak to each other over TLS, and only to those "
                      "whose certificate these signed (default: no TLS between the roles)");
  command->add_option("--peer-cert", peer.cert,
                      "PEM certificate (chain) of this process for the others; all three files are read "
                      "again when they change");
  command->add_option("--peer-key", peer.key, "Its private key");
}

void AddTraces(CLI::App* command, TraceOptions& trace) {
  command
      ->add_option("--otlp-endpoint", trace.endpoint,
                   "Where spans of traces go: http://host:4317 of an OpenTelemetry collector (OTLP over "
                   "gRPC), https:// for TLS (default: nowhere)")
      ->envname("OTEL_EXPORTER_OTLP_ENDPOINT");
}

void AddHttp(CLI::App* command, HttpOptions& http) {
  AddVllmMetrics(command, http.vllm_metrics);
  command->add_option("--listen", http.listen, "Address of the HTTP API; port 0 takes any free one")
      ->capture_default_str();
  command->add_option("--http-threads", http.http_threads, "Threads that serve connections")
      ->check(CLI::Range(1, 256))
      ->capture_default_str();
  command->add_option("--connections-max", http.connections_max, "Open client connections")
      ->check(CLI::Range(1, 1 << 20))
      ->capture_default_str();
  command->add_option("--request-timeout", http.request_timeout, "Seconds a request may take")
      ->check(CLI::PositiveNumber)
      ->capture_default_str();
  command->add_option("--keepalive", http.keepalive, "Seconds between comment lines in a silent stream")
      ->check(CLI::PositiveNumber)
      ->capture_default_str();
  command
      ->add_option("--local-prefill-tokens-max", http.local_prefill_tokens_max,
                   "Prompts up to this length are prefilled by the decode worker itself; 0 = none")
      ->check(CLI::NonNegativeNumber)
      ->capture_default_str();
  command->add_option(
      "--grpc-listen", http.grpc_listen,
      "Address of the same API over gRPC (millrace.v1.Chat), behind the same keys and certificate "
      "(default: not served)");
  command->add_option("--admin-listen", http.admin_listen,
                      "Address of a listener of its own for /metrics, /abort and the live view, without keys "
                      "(default: they are on --listen, behind the keys)");
  command->add_option("--api-keys", http.api_keys,
                      "File of API keys, one a line, a name before it if wanted; read again when it changes "
                      "(default: everybody may ask)");
  command->add_option("--tls-cert", http.tls_cert,
                      "PEM certificate (chain) of the API; read again when it changes");
  command->add_option("--tls-key", http.tls_key, "Its private key");
  command->add_option("--tls-client-ca", http.tls_client_ca,
                      "PEM certificates that must have signed the clients' own");
  command->add_option("--cors-origin", http.cors_origins,
                      "Origin of pages that may ask from a browser, repeatable; '*' = all (default: none)");
  command
      ->add_option("--requests-max", http.requests_max,
                   "Answers that the workers make at once for this gateway")
      ->check(CLI::Range(1, 1 << 20))
      ->capture_default_str();
  command
      ->add_option("--queue-max", http.queue_max,
                   "Requests that wait in the gateway; one more is answered 429")
      ->check(CLI::Range(0, 1 << 20))
      ->capture_default_str();
}

// For who may begin a trace.
void AddTraceSample(CLI::App* command, TraceOptions& trace) {
  command
      ->add_option("--trace-sample", trace.sample,
                   "Part of the requests without a trace of their own that begin one; a traceparent's flag "
                   "decides for the others")
      ->check(CLI::Range(0.0, 1.0))
      ->capture_default_str();
}

}  // namespace

void AddConfigFile(CLI::App& app) {
  app.config_formatter(std::make_shared<JsonConfig>(&app));
  app.set_config("--config", "",
                 "JSON file whose keys are the command's flags; flags on the command line win");
  app.allow_config_extras(false);
}

CLI::App* AddServe(CLI::App& app, ServeOptions& options) {
  CLI::App* command = AddCommand(
      app, "serve", "Serve a model from this process: gateway, prefill and decode worker together");
  AddModel(command, options.model);
  AddHttp(command, options.http);
  command->add_flag("--aggregated", options.aggregated,
                    "One worker for prefill and decode instead of two joined by the transfer engine");
  AddStallMax(command, options.stall_max);
  command->add_option("--drain", options.drain, "Seconds that running answers get after SIGTERM")
      ->check(CLI::NonNegativeNumber)
      ->capture_default_str();
  AddTraces(command, options.trace);
  AddTraceSample(command, options.trace);
  AddHosting(command, options.log);
  return command;
}

CLI::App* AddGateway(CLI::App& app, GatewayCommandOptions& options) {
  CLI::App* command = AddCommand(app, "gateway", "Serve the HTTP API in front of prefill and decode workers");
  command
      ->add_option("--model", options.model,
                   "Checkpoint directory; only config.json and the tokenizer files are read")
      ->required();
  command->add_option("--model-name", options.model_name,
                      "Name that clients use (default: the directory's name)");
  AddHttp(command, options.http);
  command
      ->add_option("--decode", options.decode,
                   "Decode workers: host:port, repeatable; a DNS name stands for all its addresses")
      ->required();
  command->add_option("--prefill", options.prefill, "Prefill workers, likewise");
  AddPeerTls(command, options.peer);
  command->add_option("--drain", options.drain, "Seconds that running answers get after SIGTERM")
      ->check(CLI::NonNegativeNumber)
      ->capture_default_str();
  AddTraces(command, options.trace);
  AddTraceSample(command, options.trace);
  AddHosting(command, options.log);
  return command;
}

CLI::App* AddWorker(CLI::App& app, WorkerCommandOptions& options) {
  CLI::App* command = AddCommand(app, "worker", "Run one prefill or decode worker");
  command->add_option("--role", options.role, "prefill, decode or both")
      ->check(CLI::IsMember({"prefill", "decode", "both"}))
      ->capture_default_str();
  command->add_option("--listen", options.listen, "Address of the gRPC service")->capture_default_str();
  command->add_option("--rail", options.rails,
                      "Local address of one rail of the transfer engine (host or host:port), repeatable "
                      "(default: the host of --listen)");
  AddPeerTls(command, options.peer);
  AddVllmMetrics(command, options.vllm_metrics);
  command->add_option("--metrics-listen", options.metrics_listen,
                      "host:port where Prometheus finds /metrics (default: none)");
  command->add_option("--grant-pages", options.grant_pages, "KV pages granted to a prefill worker at a time")
      ->check(CLI::Range(1, 4096))
      ->capture_default_str();
  AddModel(command, options.model);
  AddGroup(command, options.group);
  AddStallMax(command, options.stall_max);
  command->add_option("--drain", options.drain, "Seconds that running requests get after SIGTERM")
      ->check(CLI::NonNegativeNumber)
      ->capture_default_str();
  AddTraces(command, options.trace);
  AddHosting(command, options.log);
  return command;
}

CLI::App* AddChat(CLI::App& app, ChatOptions& options) {
  CLI::App* command = AddCommand(app, "chat", "Talk to a server in the terminal");
  command->add_option("--url", options.url, "Address of the HTTP API")->capture_default_str();
  command->add_option("--system", options.system, "System message");
  command->add_option("-p,--prompt", options.prompt, "Ask this one question and exit");
  command->add_option("--temperature", options.temperature, "0 = always the likeliest token")
      ->check(CLI::Range(0.0, 2.0))
      ->capture_default_str();
  command->add_option("--max-tokens", options.max_tokens, "Longest answer in tokens; 0 = what fits")
      ->check(CLI::NonNegativeNumber)
      ->capture_default_str();
  return command;
}

CLI::App* AddRole(CLI::App& app, RoleOptions& options) {
  CLI::App* command = AddCommand(app, "role", "Give an idle worker another role");
  command->add_option("worker", options.worker, "host:port of its gRPC service")->required();
  command->add_option("role", options.role, "prefill, decode or both")
      ->required()
      ->check(CLI::IsMember({"prefill", "decode", "both"}));
  AddPeerTls(command, options.peer);
  return command;
}

CLI::App* AddInspect(CLI::App& app, InspectOptions& options) {
  CLI::App* command = AddCommand(app, "inspect", "Check a checkpoint and say what it is");
  command->add_option("--model,model", options.model, "Checkpoint directory")->required();
  return command;
}

CLI::App* AddDoctor(CLI::App& app, DoctorOptions& options) {
  CLI::App* command = AddCommand(app, "doctor", "Say in plain words whether this machine can serve");
  command->footer(
      "Each finding says what was found, why it matters and how to mend it. Exit status 0: this machine can "
      "serve; 1: a\nproblem is named.");
  command
      ->add_option("--require", options.require, "What serving here cannot do without, repeatable: rdma, gpu")
      ->check(CLI::IsMember({"rdma", "gpu"}));
  command
      ->add_option("--memory", options.memory, "Memory that the server will need, e.g. 28GiB; 0 = not known")
      ->capture_default_str();
  command->add_option("--listen", options.listen, "host:port that must be free, repeatable");
  command->add_option("--peer", options.peers, "host:port that must answer, repeatable");
  command->add_flag("--json", options.json, "Findings as one JSON object");
  return command;
}

CLI::App* AddTransferBench(CLI::App& app, TransferBenchOptions& options) {
  CLI::App* command = AddCommand(
      app, "transfer-bench",
      "Measure the transfer engine between a --target and an initiator (--connect), or within this process");
  command->footer(
      "  millrace transfer-bench --target --listen 10.0.0.2:7400 --rail 10.1.0.2:0 --rail 10.2.0.2:0\n"
      "  millrace transfer-bench --connect 10.0.0.2:7400 --rail 10.1.0.1:0 --rail 10.2.0.1:0 --block "
      "4KiB,1MiB\n"
      "Every flag is also a key of the JSON file given by --config.");
  CLI::Option* const target =
      command->add_flag("--target", options.target, "Lend memory to initiators until a signal comes");
  command->add_option("--rail", options.rails,
                      "host:port of one TCP rail here, repeatable (port 0: any); auto: every usable address");
  command->add_option("--include", options.include, "Only these interfaces, devices or addresses (patterns)");
  command->add_option("--exclude", options.exclude, "Not these");
  command->add_option("--kind", options.kinds, "Kinds of rail to use (default: all that work)")
      ->check(CLI::IsMember({"tcp", "shm", "rdma", "local"}));
  command->add_option("--listen", options.listen, "Control address of the target")
      ->capture_default_str()
      ->needs(target);
  command->add_option("--memory-max", options.memory_max, "Memory that the target lends to all initiators")
      ->capture_default_str();
  command->add_option("--log-level", options.log.level, "trace, debug, info, warn, error or off")
      ->capture_default_str();
  const std::vector<CLI::Option*> initiator = {
      command->add_option("--connect", options.connect, "Control address of a target"),
      command->add_option("--op", options.op, "write, read or mixed")
          ->check(CLI::IsMember({"write", "read", "mixed"}))
          ->capture_default_str(),
      command->add_option("--block", options.blocks, "Bytes of a block, e.g. 4KiB,1MiB; each a row")
          ->delimiter(',')
          ->capture_default_str(),
      command->add_option("--batch", options.batches, "Blocks of one transfer; each a row")
          ->delimiter(',')
          ->check(CLI::Range(1, 1 << 20))
          ->capture_default_str(),
      command->add_option("--threads", options.threads, "Threads that submit; each a row")
          ->delimiter(',')
          ->check(CLI::Range(1, 64))
          ->capture_default_str(),
      command->add_option("--depth", options.depth, "Transfers in flight per thread")
          ->check(CLI::Range(1, 4096))
          ->capture_default_str(),
      command->add_option("--seconds", options.seconds, "Measured time of a row")
          ->check(CLI::Range(0.01, 86400.0))
          ->capture_default_str(),
      command->add_option("--warmup", options.warmup, "Seconds before that")
          ->check(CLI::Range(0.0, 3600.0))
          ->capture_default_str(),
      command->add_option("--memory", options.memory, "Working set of a thread on each side")
          ->capture_default_str(),
      command->add_flag("--check", options.check, "Compare every byte with what it should be"),
      command->add_flag("--scatter", options.scatter, "Blocks of a transfer go to shuffled places"),
      command->add_flag("--prepare", options.prepare, "Check lists of blocks once, not with every transfer"),
      command->add_flag("--reconnect", options.reconnect, "Look for a lost target again and go on"),
      command->add_option("--background", options.background,
                          "Block size of bulk writes beside the measured ones, at a lower priority"),
      command
          ->add_option("--timeline", options.timeline_ms,
                       "Milliseconds of a bucket of the goodput over time (--json)")
          ->check(CLI::Range(0.1, 60000.0)),
      command->add_option("--fault", options.faults,
                          "SECONDS:COMMAND, repeatable: a shell command at a time of each row"),
      command->add_flag("--json", options.json, "One JSON object instead of a table")};
  for (CLI::Option* option : initiator) option->excludes(target);
  return command;
}

std::string EffectiveConfiguration(const CLI::App& command) {
  std::string text = command.get_name() + ":";
  for (const CLI::Option* option : command.get_options()) {
    if (option->get_lnames().empty() || option->get_lnames()[0] == "help") continue;
    std::string value;
    for (const std::string& result : option->results()) value += (value.empty() ? "" : ",") + result;
    if (value.empty()) value = option->get_default_str();
    if (value.empty()) value = option->get_expected_max() == 0 ? "false" : "-";
    text += fmt::format(" {}={}", option->get_lnames()[0], value);
  }
  return text;
}

StatusOr<size_t> ParseBytes(const std::string& text) {
  size_t value = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  const std::string unit(end, text.data() + text.size());
  int shift = -1;
  if (unit.empty() || unit == "B") shift = 0;
  if (unit == "KiB") shift = 10;
  if (unit == "MiB") shift = 20;
  if (unit == "GiB") shift = 30;
  if (error != std::errc() || shift < 0 || value > (SIZE_MAX >> shift)) {
    return InvalidArgument("'{}' is not a size: write e.g. 512MiB or 8GiB", text);
  }
  return value << shift;
}

}  // namespace millrace::server
