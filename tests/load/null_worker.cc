// null_worker: decode workers whose model does no maths, for measuring everything around the model.
//
//   null_worker --model deploy/models/ling-tiny --step-ms 100
//
// The engine, the service and the protocol are the real ones; see null_backend.h for its tokens. Several
// workers (--workers) end their steps one after the other, evenly. Prints {"addresses", "tick_ms", "every":
// ticks of a step, "tokens": [their texts]} when it serves, and serves until SIGTERM.
#include <signal.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <cctype>

#include "base/json.h"
#include "base/log.h"
#include "server/worker/worker.h"
#include "tests/load/null_backend.h"

namespace millrace::server {
namespace {

struct Options {
  std::string model;
  double step_ms = 100;
  int workers = 1;
  int32_t running_max = 1500;
};

constexpr size_t kTokensMax = 1000;

// Tokens that are one word of plain letters each, so that a reader needs no unescaping and no context.
std::vector<int32_t> PlainTokens(const engine::Tokenizer& tokenizer, int32_t vocab_size) {
  std::vector<int32_t> tokens;
  for (int32_t id = 0; id < vocab_size && tokens.size() < kTokensMax; ++id) {
    const std::string_view text = tokenizer.Bytes(id);
    const bool plain = text.size() > 1 &&
                       std::all_of(text.begin(), text.end(), [](unsigned char c) { return std::isalpha(c); });
    if (plain && !tokenizer.IsSpecial(id)) tokens.push_back(id);
  }
  return tokens;
}

// Members go in reverse order.
struct NullWorker {
  std::unique_ptr<engine::Engine> engine;
  std::unique_ptr<transfer::Transfer> transfer;
  std::unique_ptr<Worker> worker;
};

StatusOr<NullWorker> Start(const Options& options, const engine::ModelConfig& config,
                           int32_t num_vocabulary_tokens, Duration tick, int phase,
                           const std::vector<int32_t>& tokens) {
  engine::EngineOptions engine_options;
  engine_options.batch_tokens_max = 8 * options.running_max;
  engine_options.running_max = options.running_max;
  engine_options.waiting_max = options.running_max;
  engine_options.num_vocabulary_tokens = num_vocabulary_tokens;
  engine_options.prefix_cache = false;
  const int32_t pages = options.running_max * engine::PagesFor(config.max_position);
  auto backend = std::make_unique<engine::NullBackend>(
      config, pages, options.running_max + engine::kScoredRowsMax, tick, options.workers, phase, tokens);
  NullWorker made;
  MR_ASSIGN_OR_RETURN(made.engine, engine::Engine::Create(engine_options, std::move(backend), nullptr));
  MR_ASSIGN_OR_RETURN(made.transfer, transfer::Transfer::Create({}));
  WorkerOptions service;
  service.model_name = "null";
  service.model_digest = "null";
  MR_ASSIGN_OR_RETURN(made.worker, Worker::Start(service, made.engine.get(), made.transfer.get()));
  return made;
}

Status Run(const Options& options) {
  sigset_t signals;
  sigemptyset(&signals);
  sigaddset(&signals, SIGTERM);
  sigaddset(&signals, SIGINT);
  pthread_sigmask(SIG_BLOCK, &signals, nullptr);
  MR_RETURN_IF_ERROR(ConfigureLog({.level = "warn"}));
  MR_ASSIGN_OR_RETURN(engine::ModelConfig config, engine::LoadModelConfig(options.model));
  MR_ASSIGN_OR_RETURN(const auto tokenizer, engine::Tokenizer::Load(options.model));
  config.num_mtp_layers = 0;
  const std::vector<int32_t> tokens = PlainTokens(*tokenizer, config.vocab_size);
  Json said = {{"tokens", Json::array()}};
  for (const int32_t token : tokens) said["tokens"].push_back(std::string(tokenizer->Bytes(token)));

  const double tick_ms = options.step_ms / options.workers;
  const auto tick = std::chrono::duration_cast<Duration>(std::chrono::duration<double, std::milli>(tick_ms));
  said["tick_ms"] = tick_ms;
  said["every"] = options.workers;
  std::vector<NullWorker> workers;
  for (int phase = 0; phase < options.workers; ++phase) {
    MR_ASSIGN_OR_RETURN(NullWorker made, Start(options, config, tokenizer->size(), tick, phase, tokens));
    said["addresses"].push_back(made.worker->address());
    workers.push_back(std::move(made));
  }
  fmt::print("{}\n", DumpJson(said));
  std::fflush(stdout);
  int number = 0;
  sigwait(&signals, &number);
  for (NullWorker& made : workers) made.worker->Shutdown(Duration::zero());
  return OkStatus();
}

}  // namespace
}  // namespace millrace::server

int main(int argc, char** argv) {
  millrace::server::Options options;
  CLI::App app("A decode worker whose model does no maths");
  app.add_option("--model", options.model, "Checkpoint directory: config.json and tokenizer.json")
      ->required();
  app.add_option("--step-ms", options.step_ms, "Time of a step")
      ->check(CLI::Range(1.0, 10000.0))
      ->capture_default_str();
  app.add_option("--workers", options.workers, "How many")->check(CLI::Range(1, 200))->capture_default_str();
  app.add_option("--running-max", options.running_max, "Sequences of each")
      ->check(CLI::Range(1, 4000))
      ->capture_default_str();
  CLI11_PARSE(app, argc, argv);
  const millrace::Status status = millrace::server::Run(options);
  if (!status.ok()) fmt::print(stderr, "null_worker: {}\n", millrace::Message(status));
  return status.ok() ? 0 : 1;
}
