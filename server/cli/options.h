#pragma once
// What the sub-commands take. Every field is a flag and a key of the JSON configuration file (--config);
// unknown keys refuse to start.

#include <CLI/CLI.hpp>
#include <memory>
#include <string>
#include <vector>

#include "base/log.h"

namespace millrace::server {

struct ModelOptions {
  std::string model;       // checkpoint directory
  std::string model_name;  // as clients name it; empty: the directory's name
  std::string backend = "cpu";
  std::string precision = "bfloat16";
  std::string quantize = "none";
  std::string weight_cache;  // directory; empty: packed weights are made anew at every start
  std::string isa = "auto";
  int threads = 0;                   // 0 = every processor this process may use
  std::string kv_memory = "512MiB";  // KV pages, per engine
  int32_t batch_tokens_max = 512;
  int32_t running_max = 64;
  int32_t waiting_max = 256;
  std::string prefix_cache = "on";
  std::string kv_host_memory = "0";  // cached pages that the pool evicts
  std::string kv_disk_size = "0";    // and those that host memory evicts
  std::string kv_disk_directory = "/var/tmp";
  std::string speculate = "auto";
  double token_gap_ms = 200;
};

// A worker that is one of several processes which hold a model together.
struct GroupOptions {
  int ranks = 1;
  int rank = -1;                   // -1: start all of them
  std::string directory;           // on tmpfs, common to the ranks of one host
  std::vector<std::string> peers;  // host:port of every rank, over several hosts; or rank 0's alone
  int32_t redundant_experts = 0;
  double rebalance_every = 30;  // seconds; 0 = never
  double stall_max = 20;        // seconds
};

struct HttpOptions {
  std::string listen = "127.0.0.1:8000";
  int http_threads = 1;
  int32_t connections_max = 4096;
  double request_timeout = 600;  // seconds
  double keepalive = 15;         // seconds between comment lines in a silent stream
  int32_t local_prefill_tokens_max = 0;
  std::string grpc_listen;   // millrace.v1.Chat; empty: not served
  std::string admin_listen;  // metrics and control; empty: on `listen`
  std::string api_keys;      // file
  std::string tls_cert;      // PEM files
  std::string tls_key;
  std::string tls_client_ca;
  std::vector<std::string> cors_origins;
  std::string vllm_metrics = "on";
  int32_t requests_max = 1024;  // choices at the workers at once
  int32_t queue_max = 1024;     // requests that wait in the gateway
};

// Between the roles. PEM files, all three or none.
struct PeerTlsCommandOptions {
  std::string ca;
  std::string cert;
  std::string key;
};

struct TraceOptions {
  std::string endpoint;  // of an OpenTelemetry collector; empty: spans go nowhere
  double sample = 1;
};

struct ServeOptions {
  LogOptions log;
  TraceOptions trace;
  ModelOptions model;
  HttpOptions http;
  bool aggregated = false;
  double stall_max = 60;  // seconds
  double drain = 30;      // seconds
};

struct GatewayCommandOptions {
  LogOptions log;
  TraceOptions trace;
  std::string model;
  std::string model_name;
  HttpOptions http;
  PeerTlsCommandOptions peer;
  std::vector<std::string> prefill;
  std::vector<std::string> decode;
  double drain = 30;
};

struct WorkerCommandOptions {
  LogOptions log;
  TraceOptions trace;
  ModelOptions model;
  GroupOptions group;
  PeerTlsCommandOptions peer;
  std::string role = "both";
  std::string listen = "127.0.0.1:7001";
  std::vector<std::string> rails;  // addresses of the transfer engine's TCP rails
  std::string vllm_metrics = "on";
  std::string metrics_listen;  // host:port of /metrics; empty: none
  int32_t grant_pages = 8;
  double stall_max = 60;  // seconds
  double drain = 30;
};

struct ChatOptions {
  std::string url = "http://127.0.0.1:8000";
  std::string system;
  std::string prompt;  // one question, then exit
  double temperature = 0;
  int32_t max_tokens = 0;  // 0 = the server's default
};

struct RoleOptions {
  PeerTlsCommandOptions peer;
  std::string worker;
  std::string role;
};

struct InspectOptions {
  std::string model;
};

struct DoctorOptions {
  std::vector<std::string> require;  // rdma, gpu
  std::string memory = "0";
  std::vector<std::string> listen;
  std::vector<std::string> peers;
  bool json = false;
};

struct TransferBenchOptions {
  LogOptions log{.level = "warn"};
  bool target = false;
  std::string listen = "127.0.0.1:7400";  // the target's control address
  std::string connect;                    // the initiator's target; empty without `target`: both roles here
  std::vector<std::string> rails;
  std::vector<std::string> include;
  std::vector<std::string> exclude;
  std::vector<std::string> kinds;
  std::string memory_max = "4GiB";
  std::string op = "write";
  std::vector<std::string> blocks{"1MiB"};
  std::vector<int> batches{1};
  std::vector<int> threads{1};
  int depth = 4;
  double seconds = 3;
  double warmup = 0.5;
  std::string memory = "64MiB";
  bool check = false;
  bool scatter = false;
  bool prepare = false;
  bool reconnect = false;
  std::string background;
  double timeline_ms = 0;
  std::vector<std::string> faults;
  bool json = false;
};

// --config FILE, for every sub-command.
void AddConfigFile(CLI::App& app);

// Each adds its sub-command to `app`; the struct must outlive parsing.
CLI::App* AddServe(CLI::App& app, ServeOptions& options);
CLI::App* AddGateway(CLI::App& app, GatewayCommandOptions& options);
CLI::App* AddWorker(CLI::App& app, WorkerCommandOptions& options);
CLI::App* AddChat(CLI::App& app, ChatOptions& options);
CLI::App* AddRole(CLI::App& app, RoleOptions& options);
CLI::App* AddInspect(CLI::App& app, InspectOptions& options);
CLI::App* AddDoctor(CLI::App& app, DoctorOptions& options);
CLI::App* AddTransferBench(CLI::App& app, TransferBenchOptions& options);

// "effective configuration: listen=... threads=..." of a parsed sub-command, for the log.
std::string EffectiveConfiguration(const CLI::App& command);

// "512MiB", "2GiB", "1000000" -> bytes.
StatusOr<size_t> ParseBytes(const std::string& text);

}  // namespace millrace::server
