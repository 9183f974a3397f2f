// step_bench: what of an engine's decode step is the model, what is sampling, and what the rest.
//
//   step_bench --model deploy/models/ling-tiny --streams 1,4,16
//   step_bench --shape ling-mini-e64 --quantize int8 --sampling temperature --serial
//
// A whole engine decodes `streams` answers at once; the backend is wrapped in one that looks at the clock. A
// step is the time from one Forward's begin to the next one's; `model` is the time inside Forward, `sampling`
// that inside RunParallel, `rest` what is left: commands, admission, pages, cache, sinks, statistics. Medians
// over the steps with every stream in them; shares are of the median step. --serial keeps sampling on the
// engine's thread, for comparison.

#include <fmt/format.h>

#include <CLI/CLI.hpp>
#include <algorithm>

#include "base/check.h"
#include "base/random.h"
#include "engine/backend/cpu/cpu_backend.h"
#include "engine/model/checkpoint.h"
#include "tests/bench/engine_on_model.h"
#include "tests/bench/random_model.h"

namespace millrace::engine {
namespace {

struct Options {
  std::string model;
  std::string shape = "ling-bench-s";
  std::string quantize = "int8";
  int threads = 2;
  int steps = 100;
  std::vector<int> streams = {1, 4, 16};
  std::vector<std::string> sampling = {"greedy", "temperature", "top-p", "logprobs"};
  bool serial = false;
};

double Now() { return Seconds(Clock::System().Now().time_since_epoch()); }

struct StepTimes {
  size_t rows = 0;
  double begin = 0, forward = 0, sampling = 0;
};

// Engine thread; the times are read when the engine is gone.
class TimedBackend final : public Backend {
 public:
  TimedBackend(std::unique_ptr<Backend> inner, bool serial, std::vector<StepTimes>* times)
      : inner_(std::move(inner)), serial_(serial), times_(times) {}
  const ModelConfig& config() const override { return inner_->config(); }
  const KvLayout& kv_layout() const override { return inner_->kv_layout(); }
  std::span<std::byte> kv_memory() override { return inner_->kv_memory(); }
  std::string Describe() const override { return inner_->Describe(); }
  StatusOr<StepOutput> Forward(const Batch& batch, const LayerDone& layer_done) override {
    StepTimes& step = times_->emplace_back();
    const bool decodes = std::all_of(batch.segments.begin(), batch.segments.end(),
                                     [](const Segment& segment) { return segment.tokens.size() == 1; });
    step.rows = decodes ? batch.segments.size() : 0;
    step.begin = Now();
    auto output = inner_->Forward(batch, layer_done);
    step.forward = Now() - step.begin;
    return output;
  }
  void RunParallel(int64_t num_tasks, int64_t work, absl::FunctionRef<void(int64_t)> task) override {
    const double begin = Now();
    if (serial_) {
      for (int64_t i = 0; i < num_tasks; ++i) task(i);
    } else {
      inner_->RunParallel(num_tasks, work, task);
    }
    times_->back().sampling += Now() - begin;
  }

 private:
  const std::unique_ptr<Backend> inner_;
  const bool serial_;
  std::vector<StepTimes>* const times_;
};

StatusOr<std::shared_ptr<const Weights>> Load(const Options& options) {
  CpuWeightsOptions load;
  MR_ASSIGN_OR_RETURN(load.quantization, ParseQuantization(options.quantize));
  if (options.model.empty()) {
    MR_ASSIGN_OR_RETURN(const ModelConfig config, ShapeNamed(options.shape, 0));
    return LoadCpuWeights(RandomTensors(7), config, load);
  }
  MR_ASSIGN_OR_RETURN(ModelConfig config, LoadModelConfig(options.model));
  MR_ASSIGN_OR_RETURN(const std::unique_ptr<Checkpoint> checkpoint, Checkpoint::Open(options.model));
  std::vector<std::string> unused;
  MR_RETURN_IF_ERROR(CheckTensors(*checkpoint, &config, &unused));
  return LoadCpuWeights(*checkpoint, config, load);
}

SamplingParams Sampling(const std::string& name) {
  SamplingParams params;
  params.temperature = name == "greedy" || name == "logprobs" ? 0.0f : 0.8f;
  if (name == "top-p") params.top_p = 0.9f;
  if (name == "logprobs") params.num_logprobs = 5;
  params.ignore_eos = true;
  return params;
}

Status Run(const Options& options, const std::shared_ptr<const Weights>& weights, const std::string& sampling,
           int streams) {
  EngineOptions engine_options;
  engine_options.num_vocabulary_tokens = weights->config().vocab_size;
  engine_options.running_max = std::max(streams, 1);
  CpuBackendOptions backend;
  backend.num_threads = options.threads;
  backend.num_pages = streams * (PagesFor(options.steps + 32) + 1);
  backend.batch_tokens_max = engine_options.batch_tokens_max;
  backend.logit_rows_max = streams + kScoredRowsMax;
  MR_ASSIGN_OR_RETURN(std::unique_ptr<Backend> cpu, MakeCpuBackend(weights, backend));
  std::vector<StepTimes> times;
  times.reserve(static_cast<size_t>(2 * options.steps + 1000));
  {
    MR_ASSIGN_OR_RETURN(
        const std::unique_ptr<Engine> engine,
        Engine::Create(engine_options, std::make_unique<TimedBackend>(std::move(cpu), options.serial, &times),
                       nullptr));
    std::vector<EngineRequest> requests;
    Random random(1);
    for (int s = 0; s < streams; ++s) {
      EngineRequest& request = requests.emplace_back();
      request.id = static_cast<RequestId>(s + 1);
      for (int i = 0; i < 16; ++i) {
        request.prompt.push_back(
            static_cast<int32_t>(random.Below(static_cast<uint64_t>(engine_options.num_vocabulary_tokens))));
      }
      request.sampling = Sampling(sampling);
      request.sampling.seed = static_cast<uint64_t>(s);
      request.sampling.max_tokens = options.steps + 10;
    }
    AskAll(engine.get(), requests);
  }
  std::vector<double> step, model, sample, rest;
  for (size_t i = 0; i + 1 < times.size(); ++i) {
    if (times[i].rows != static_cast<size_t>(streams)) continue;
    step.push_back(times[i + 1].begin - times[i].begin);
    model.push_back(times[i].forward);
    sample.push_back(times[i].sampling);
    rest.push_back(step.back() - model.back() - sample.back());
  }
  if (step.size() < 10) return Internal("only {} steps had all streams", step.size());
  const double whole = Percentile(step, 0.5);
  const auto part = [&](const std::vector<double>& of) {
    const double median = Percentile(of, 0.5);
    return fmt::format("{:9.1f} us {:5.1f} %", median * 1e6, median / whole * 100);
  };
  fmt::print("{:12} {:7} {:9.3f} ms  {}  {}  {}\n", sampling, streams, whole * 1e3, part(model), part(sample),
             part(rest));
  std::fflush(stdout);
  return OkStatus();
}

Status RunAll(const Options& options) {
  MR_ASSIGN_OR_RETURN(const std::shared_ptr<const Weights> weights, Load(options));
  fmt::print("{} {}, {} threads{}\n{:12} {:7} {:>12}  {:>20}  {:>20}  {:>20}\n",
             options.model.empty() ? options.shape : options.model, options.quantize, options.threads,
             options.serial ? ", sampling on one" : "", "sampling", "streams", "step", "model", "sampling",
             "rest");
  for (const std::string& sampling : options.sampling) {
    for (const int streams : options.streams) {
      MR_RETURN_IF_ERROR(Run(options, weights, sampling, streams));
    }
  }
  return OkStatus();
}

}  // namespace
}  // namespace millrace::engine

int main(int argc, char** argv) {
  millrace::engine::Options options;
  CLI::App app("What of a decode step is the model, and what is not");
  app.add_option("--model", options.model, "A checkpoint, instead of a shape");
  app.add_option("--shape", options.shape, "ling-bench-s, ling-mini-e64 or ling-mini-2.0")
      ->capture_default_str();
  app.add_option("--quantize", options.quantize, "none, int8 or int4")->capture_default_str();
  app.add_option("--threads", options.threads)->capture_default_str();
  app.add_option("--steps", options.steps)->capture_default_str();
  app.add_option("--streams", options.streams)->delimiter(',')->capture_default_str();
  app.add_option("--sampling", options.sampling, "greedy, temperature (0.8), top-p (0.9), logprobs (5)")
      ->delimiter(',')
      ->capture_default_str();
  app.add_flag("--serial", options.serial, "Sample on the engine's thread alone");
  CLI11_PARSE(app, argc, argv);
  const millrace::Status status = millrace::engine::RunAll(options);
  if (status.ok()) return 0;
  fmt::print(stderr, "step_bench: {}\n", millrace::Message(status));
  return 1;
}
