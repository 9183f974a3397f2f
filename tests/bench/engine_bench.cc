// engine_bench: one backend on random weights of a Ling shape, prefill and decode, as a table and as JSON.
//
//   engine_bench --shape ling-mini-2.0 --quantize int8 --threads 2 --prefill 512 --decode 1,16 --context
//   0,2048
//
// Every figure is the median of its repeats, with the smallest and largest beside it. GB/s counts the weights
// that a step has to read (each chosen expert once; counted from the step's own routing) and the KV that it
// attends to; GOP/s counts two operations per weight and token. Both are also given as a share of what this
// machine was measured to do in the same process (machine_limits.h). --cpu-time is for a machine with other
// load: it counts the processor time of one compute thread.

#include <fmt/format.h>
#include <sys/resource.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <chrono>
#include <fstream>
#include <set>

#include "base/check.h"
#include "base/json.h"
#include "base/random.h"
#include "engine/backend/cpu/cpu_backend.h"
#include "tests/bench/machine_limits.h"
#include "tests/bench/random_model.h"

namespace millrace::engine {
namespace {

struct Options {
  std::string shape = "ling-bench-s";
  std::string quantize = "int8";
  std::string isa = "auto";
  std::vector<int> threads = {1, 2};
  std::vector<int> prefill = {128, 512, 2048};
  std::vector<int> decode = {1, 4, 8, 16};
  std::vector<int> context = {0};
  int layers = 0;
  int repeats = 5;  // of a prefill
  int steps = 24;   // of a decode
  double kv_gib = 1;
  bool cpu_time = false;
  std::string json;
};

double Now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

double CpuSeconds() {
  timespec time{};
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &time);
  return static_cast<double>(time.tv_sec) + 1e-9 * static_cast<double>(time.tv_nsec);
}

// Sizes of one step's work, by formula.
class Work {
 public:
  // Bits per weight of the matrices, and of the head.
  Work(const ModelConfig& config, double bits, double head_bits)
      : c_(config), bytes_(bits / 8), head_bytes_(head_bits / 8) {}

  double expert() const { return 3.0 * c_.hidden_size * c_.moe_intermediate_size; }
  double head() const { return double{1} * c_.hidden_size * c_.vocab_size; }
  // Weights that every token passes, without the head.
  double common() const {
    const double attention = double{1} * c_.hidden_size * (2 * c_.q_size() + 2 * c_.kv_size());
    const double moe_layers = c_.num_layers - c_.num_dense_layers;
    return attention * c_.num_layers + 3.0 * c_.hidden_size * c_.intermediate_size * c_.num_dense_layers +
           3.0 * c_.hidden_size * c_.shared_intermediate_size * moe_layers;
  }
  double router_bytes() const {
    return 2.0 * c_.hidden_size * c_.num_experts * (c_.num_layers - c_.num_dense_layers);
  }
  double operations(double tokens, double logit_rows, double keys) const {
    const double routed = expert() * c_.experts_per_token + double{1} * c_.hidden_size * c_.num_experts;
    const double weights =
        tokens * (common() + routed * (c_.num_layers - c_.num_dense_layers)) + logit_rows * head();
    return 2 * weights + 4 * keys * c_.q_size() * c_.num_layers;
  }
  // `experts`: distinct (layer, expert) pairs of the step; `keys`: attended by all of its tokens together.
  double step_bytes(double experts, double keys) const {
    return bytes_ * (common() + experts * expert()) + head_bytes_ * head() + router_bytes() +
           keys * 4.0 * c_.kv_size() * c_.num_layers;
  }

 private:
  const ModelConfig c_;
  const double bytes_;
  const double head_bytes_;
};

struct Spread {
  double median = 0, low = 0, high = 0;
};
Spread SpreadOf(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  return {values[values.size() / 2], values.front(), values.back()};
}

class Bench {
 public:
  Bench(const Options& options, std::shared_ptr<const Weights> weights, double bits)
      : options_(options),
        weights_(std::move(weights)),
        work_(weights_->config(), bits, std::max(bits, options.quantize == "none" ? 16 : 8.25)),
        bits_(bits) {}

  Status Run(int threads) {
    limits_ = bench::MeasureLimits(threads);
    peak_ = options_.quantize == "none" || limits_.int8_gop_per_s == 0 ? limits_.fp32_gflop_per_s
                                                                       : limits_.int8_gop_per_s;
    fmt::print("\n{} threads: {:.1f} GB/s read, {:.0f} GOP/s int8, {:.0f} GFLOP/s fp32\n", threads,
               limits_.read_gb_per_s, limits_.int8_gop_per_s, limits_.fp32_gflop_per_s);
    threads_ = threads;
    CpuBackendOptions backend;
    backend.num_threads = threads;
    MR_ASSIGN_OR_RETURN(backend.isa, ParseIsa(options_.isa));
    backend.batch_tokens_max = 16;
    for (const int tokens : options_.prefill)
      backend.batch_tokens_max = std::max(backend.batch_tokens_max, tokens);
    backend.logit_rows_max = 16;
    const ModelConfig& config = weights_->config();
    const size_t page_bytes =
        size_t{4} * kPageTokens * static_cast<size_t>(config.kv_size() * config.num_layers);
    backend.num_pages = static_cast<int32_t>(options_.kv_gib * (1U << 30) / static_cast<double>(page_bytes));
    MR_ASSIGN_OR_RETURN(backend_, MakeCpuBackend(weights_, backend));
    if (threads_ == options_.threads.front()) fmt::print("{}\n", backend_->Describe());
    FillKv();
    SetRouterTrace(*backend_, [this](int32_t layer, int32_t, std::span<const int32_t> experts) {
      for (const int32_t e : experts) chosen_.insert(layer * 65536 + e);
    });
    for (const int tokens : options_.prefill) MR_RETURN_IF_ERROR(Prefill(tokens));
    for (const int context : options_.context) {
      for (const int streams : options_.decode) MR_RETURN_IF_ERROR(Decode(streams, context));
    }
    return OkStatus();
  }
  const Json& rows() const { return rows_; }

 private:
  // As if a context had been computed: values near 1 in bf16.
  void FillKv() {
    auto* const values = reinterpret_cast<uint16_t*>(backend_->kv_memory().data());
    const size_t count = backend_->kv_memory().size() / 2;
    for (size_t i = 0; i < count; ++i) {
      values[i] = static_cast<uint16_t>(0x3f00U + (i * 2654435761U >> 16 & 0x80ffU));
    }
  }

  int32_t RandomToken() {
    return static_cast<int32_t>(random_.Below(static_cast<uint64_t>(weights_->config().vocab_size)));
  }

  StatusOr<double> Step(const Batch& batch) {
    chosen_.clear();
    const auto clock = options_.cpu_time ? CpuSeconds : Now;
    const double begin = clock();
    MR_ASSIGN_OR_RETURN(const StepOutput output, backend_->Forward(batch, {}));
    const double seconds = clock() - begin;
    if (output.logits.empty() || !(output.logits[0] == output.logits[0]))
      return Internal("logits are not numbers");
    return seconds;
  }

  Status Prefill(int tokens) {
    std::vector<PageId> pages(static_cast<size_t>(PagesFor(tokens)));
    if (static_cast<int32_t>(pages.size()) > backend_->kv_layout().num_pages)
      return Skip("prefill", tokens, 0);
    for (size_t p = 0; p < pages.size(); ++p) pages[p] = static_cast<PageId>(p);
    std::vector<double> seconds;
    double bytes = 0;
    for (int r = 0; r <= options_.repeats; ++r) {
      std::vector<int32_t> ids(static_cast<size_t>(tokens));
      for (int32_t& id : ids) id = RandomToken();
      Batch batch;
      batch.segments.push_back({ids, 0, pages, 1, {}});
      MR_ASSIGN_OR_RETURN(const double time, Step(batch));
      if (r > 0) seconds.push_back(time);  // the first one warms up
      bytes = work_.step_bytes(static_cast<double>(chosen_.size()), 0);
    }
    Report("prefill", tokens, 0, tokens, SpreadOf(seconds), bytes,
           work_.operations(tokens, 1, 0.5 * tokens * (tokens + 1)));
    return OkStatus();
  }

  Status Decode(int streams, int context) {
    const int32_t pages_each = PagesFor(context + options_.steps + 1);
    if (int64_t{pages_each} * streams > backend_->kv_layout().num_pages)
      return Skip("decode", streams, context);
    std::vector<std::vector<PageId>> tables;
    for (int s = 0; s < streams; ++s) {
      std::vector<PageId>& table = tables.emplace_back();
      for (int32_t p = 0; p < pages_each; ++p) table.push_back(s * pages_each + p);
    }
    std::vector<double> seconds;
    double bytes = 0;
    for (int step = 0; step <= options_.steps; ++step) {
      std::vector<int32_t> ids(static_cast<size_t>(streams));
      Batch batch;
      for (int s = 0; s < streams; ++s) {
        ids[static_cast<size_t>(s)] = RandomToken();
        batch.segments.push_back({std::span(ids).subspan(static_cast<size_t>(s), 1),
                                  context + step,
                                  tables[static_cast<size_t>(s)],
                                  1,
                                  {}});
      }
      MR_ASSIGN_OR_RETURN(const double time, Step(batch));
      if (step == 0) continue;
      seconds.push_back(time);
      bytes +=
          work_.step_bytes(static_cast<double>(chosen_.size()), double{1} * streams * (context + step + 1)) /
          options_.steps;
    }
    Report("decode", streams, context, streams, SpreadOf(seconds), bytes,
           work_.operations(streams, streams, double{1} * streams * (context + 1)));
    return OkStatus();
  }

  Status Skip(const char* phase, int size, int context) {
    fmt::print("{:8} {:5} {:7}  skipped: --kv-gib {} is too small\n", phase, size, context, options_.kv_gib);
    return OkStatus();
  }

  void Report(const char* phase, int size, int context, double tokens, const Spread& seconds, double bytes,
              double operations) {
    const double gb = bytes / seconds.median / 1e9;
    const double gop = operations / seconds.median / 1e9;
    fmt::print("{:8} {:5} {:7} {:10.1f} ({:8.1f} to {:8.1f}) {:8.2f} {:7.1f} {:5.0f} % {:8.0f} {:5.1f} %\n",
               phase, size, context, tokens / seconds.median, tokens / seconds.high, tokens / seconds.low,
               seconds.median * 1e3, gb, gb / limits_.read_gb_per_s * 100, gop, gop / peak_ * 100);
    std::fflush(stdout);
    rows_.push_back({{"shape", options_.shape},
                     {"quantize", options_.quantize},
                     {"bits_per_weight", bits_},
                     {"threads", threads_},
                     {"phase", phase},
                     {"size", size},
                     {"context", context},
                     {"tokens_per_s", tokens / seconds.median},
                     {"tokens_per_s_low", tokens / seconds.high},
                     {"tokens_per_s_high", tokens / seconds.low},
                     {"step_ms", seconds.median * 1e3},
                     {"gb_per_s", gb},
                     {"gb_per_s_limit", limits_.read_gb_per_s},
                     {"gop_per_s", gop},
                     {"gop_per_s_limit", peak_}});
  }

  const Options options_;
  const std::shared_ptr<const Weights> weights_;
  const Work work_;
  const double bits_;
  std::unique_ptr<Backend> backend_;
  Random random_{1};
  bench::MachineLimits limits_;
  double peak_ = 0;
  int threads_ = 0;
  std::set<int32_t> chosen_;  // (layer, expert) of the last step
  Json rows_ = Json::array();
};

Status RunBench(const Options& options) {
  MR_ASSIGN_OR_RETURN(const ModelConfig config, ShapeNamed(options.shape, options.layers));
  CpuWeightsOptions load;
  MR_ASSIGN_OR_RETURN(load.quantization, ParseQuantization(options.quantize));
  const double begin = Now();
  MR_ASSIGN_OR_RETURN(std::shared_ptr<const Weights> weights, LoadCpuWeights(RandomTensors(7), config, load));
  rusage usage{};
  getrusage(RUSAGE_SELF, &usage);
  fmt::print("{} {}: {:.2f} GB packed in {:.1f} s, at most {:.2f} GB resident\n", options.shape,
             options.quantize, static_cast<double>(weights->bytes()) / 1e9, Now() - begin,
             static_cast<double>(usage.ru_maxrss) * 1024 / 1e9);
  const double bits = options.quantize == "int8" ? 8.25 : options.quantize == "int4" ? 4.25 : 16;
  if (options.cpu_time && options.threads != std::vector<int>{1}) {
    return InvalidArgument(
        "--cpu-time: with several threads, waiting for each other would count; use --threads 1");
  }
  fmt::print(
      "phase     size context   tokens/s  (lowest to highest)       ms    GB/s   share    GOP/s  share\n");
  Bench bench(options, std::move(weights), bits);
  for (const int threads : options.threads) MR_RETURN_IF_ERROR(bench.Run(threads));
  if (!options.json.empty()) std::ofstream(options.json) << DumpJson(bench.rows()) << "\n";
  return OkStatus();
}

}  // namespace
}  // namespace millrace::engine

int main(int argc, char** argv) {
  millrace::engine::Options options;
  CLI::App app("Speed of one engine backend on random weights");
  app.add_option("--shape", options.shape, "ling-bench-s, ling-mini-e64 or ling-mini-2.0")
      ->capture_default_str();
  app.add_option("--layers", options.layers, "Keep only this many layers; 0 = all")->capture_default_str();
  app.add_option("--quantize", options.quantize, "none (bfloat16), int8 or int4")->capture_default_str();
  app.add_option("--isa", options.isa, "auto, portable, avx2, avx512 or amx")->capture_default_str();
  app.add_option("--threads", options.threads, "Compute threads")->delimiter(',')->capture_default_str();
  app.add_option("--prefill", options.prefill, "Prompt lengths, one chunk each")
      ->delimiter(',')
      ->capture_default_str();
  app.add_option("--decode", options.decode, "Streams decoding together")
      ->delimiter(',')
      ->capture_default_str();
  app.add_option("--context", options.context, "Tokens before the decoded ones")
      ->delimiter(',')
      ->capture_default_str();
  app.add_option("--repeats", options.repeats, "Timed runs of a prefill")->capture_default_str();
  app.add_option("--steps", options.steps, "Timed steps of a decode")->capture_default_str();
  app.add_option("--kv-gib", options.kv_gib, "Memory for KV pages")->capture_default_str();
  app.add_flag("--cpu-time", options.cpu_time,
               "Count processor time; for a machine with other load, with --threads 1");
  app.add_option("--json", options.json, "Also write the rows here");
  CLI11_PARSE(app, argc, argv);
  const millrace::Status status = millrace::engine::RunBench(options);
  if (status.ok()) return 0;
  fmt::print(stderr, "engine_bench: {}\n", millrace::Message(status));
  return 1;
}
