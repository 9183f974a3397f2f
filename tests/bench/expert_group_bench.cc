// expert_group_bench: what an expert group on one host costs and gains.
//
//   expert_group_bench --shape ling-mini-2.0 --layers 6 --quantize int8 --ranks 2 --rows 1,8,64,512
//
// For each number of rows (tokens in one step, all ranks together): the step of a single process with one
// thread and with as many threads as there are ranks, and of a group of ranks with one thread each; median of
// --steps, in turns, the ratio to one thread beside it. Then dispatch and combine alone: ranks exchange rows
// and products of that shape without any product being computed; time per layer, bytes that are written and
// read, and what share of the memory bandwidth of this machine (measured in the same process) that is.

#include <fmt/format.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <chrono>
#include <cstring>
#include <filesystem>
#include <thread>

#include "base/check.h"
#include "base/random.h"
#include "engine/backend/cpu/cpu_backend.h"
#include "engine/backend/cpu/kernels.h"
#include "engine/moe/shm_group.h"
#include "server/group/net_group.h"
#include "tests/bench/machine_limits.h"
#include "tests/bench/random_model.h"

namespace millrace::engine {
namespace {

struct Options {
  std::string shape = "ling-mini-2.0";
  std::string quantize = "int8";
  int layers = 6;
  int ranks = 2;
  std::vector<int> rows = {1, 8, 64, 512};
  int steps = 15;
  bool hosts = false;  // exchange as between hosts
};

constexpr int kRowsMax = 16;  // of figures
constexpr int kFirstPort = 27340;

struct Shared {
  std::atomic<int> turn;  // whose measurement runs: 2 * round + (0: single, 1: group)
  double single_one[kRowsMax], single_all[kRowsMax], group[kRowsMax];  // seconds a step
  double exchange[kRowsMax], bytes[kRowsMax];                          // seconds and bytes a layer
  std::atomic<int> done;
};

double Now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

double Median(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  return values[values.size() / 2];
}

template <typename T>
T Must(StatusOr<T> value) {
  MR_CHECK(value.ok(), "{}", Message(value.status()));
  return *std::move(value);
}

CpuBackendOptions BackendOf(const Options& options, int threads) {
  CpuBackendOptions backend;
  backend.num_threads = threads;
  backend.batch_tokens_max = *std::max_element(options.rows.begin(), options.rows.end());
  backend.logit_rows_max = 1;
  backend.num_pages = backend.batch_tokens_max;
  return backend;
}

// Seconds of a step over `rows` sequences of one token; the rows of rank `rank` of `ranks`.
double TimeSteps(Backend& backend, int rows, int rank, int ranks, int steps, Random& random) {
  const int mine = rows / ranks + (rank < rows % ranks ? 1 : 0);
  std::vector<PageId> pages(static_cast<size_t>(backend.kv_layout().num_pages));
  for (size_t p = 0; p < pages.size(); ++p) pages[p] = static_cast<PageId>(p);
  std::vector<double> seconds;
  for (int step = 0; step <= steps; ++step) {
    std::vector<int32_t> ids(static_cast<size_t>(mine));
    Batch batch;
    for (size_t s = 0; s < ids.size(); ++s) {
      ids[s] = static_cast<int32_t>(random.Below(static_cast<uint64_t>(backend.config().vocab_size)));
      Segment segment;
      segment.tokens = std::span(ids).subspan(s, 1);
      segment.pages = std::span(pages).subspan(s, 1);
      batch.segments.push_back(segment);
    }
    const double begin = Now();
    // A rank without rows joins: it returns when the others' step has ended.
    if (mine == 0) {
      while (!backend.JoinWanted()) std::this_thread::yield();
    }
    const auto output = backend.Forward(batch, {});
    MR_CHECK(output.ok(), "{}", Message(output.status()));
    if (step > 0) seconds.push_back(Now() - begin);
  }
  return Median(seconds);
}

// Dispatch and combine with everything but the products. Returns seconds a layer.
double TimeExchange(ExpertGroup& group, const LayerPlacement& placement, int rows, int steps, double* bytes,
                    Random& random) {
  const GroupShape& shape = group.shape();
  const int me = group.rank();
  const int mine = rows / shape.num_ranks + (me < rows % shape.num_ranks ? 1 : 0);
  const auto top_k = static_cast<size_t>(shape.experts_per_token);
  const auto hidden = static_cast<size_t>(shape.hidden_size);
  std::vector<std::byte> x(static_cast<size_t>(mine) * shape.row_bytes, std::byte{1});
  std::vector<float> residual(static_cast<size_t>(mine) * hidden);
  std::vector<double> seconds;
  volatile uint64_t sink = 0;
  for (int step = 0; step <= steps; ++step) {
    for (size_t s = 0; s < static_cast<size_t>(mine) * top_k; ++s) {
      const auto expert = static_cast<int32_t>(random.Below(static_cast<uint64_t>(shape.num_experts)));
      group.outgoing_experts()[s] = expert;
      group.outgoing_owners()[s] = static_cast<uint8_t>(
          ChooseHolder(placement[static_cast<size_t>(expert)], me, static_cast<int32_t>(s)));
    }
    MR_CHECK(group.BeginPass(PassKind::kStep, false).ok());
    const double begin = Now();
    *bytes = 0;
    for (int32_t layer = 0; layer < shape.num_layers; ++layer) {
      std::memcpy(group.outgoing_rows(), x.data(), x.size());
      MR_CHECK(group.Dispatch(mine).ok());
      double moved = static_cast<double>(2 * x.size());
      for (int32_t home = 0; home < shape.num_ranks; ++home) {
        const GroupRows theirs = group.From(home);
        float* out = group.ProductsFor(home);
        for (size_t row = 0; row < static_cast<size_t>(theirs.count); ++row) {
          const std::byte* const from = theirs.rows + row * shape.row_bytes;
          bool read = false;
          for (size_t k = 0; k < top_k; ++k) {
            if (theirs.owners[row * top_k + k] != me) continue;
            if (!read) {
              uint64_t sum = 0;
              for (size_t i = 0; i < shape.row_bytes; i += 8)
                sum += *reinterpret_cast<const uint64_t*>(from + i);
              sink = sink + sum;
              moved += static_cast<double>(shape.row_bytes);
            }
            read = true;
            for (size_t i = 0; i < hidden; ++i) out[i] = 1.0f;
            out += hidden;
            moved += static_cast<double>(hidden * sizeof(float));
          }
        }
      }
      MR_CHECK(group.Combine().ok());
      const float* next[kRanksMax];
      for (int32_t r = 0; r < shape.num_ranks; ++r) next[r] = group.ProductsOf(r);
      for (size_t s = 0; s < static_cast<size_t>(mine) * top_k; ++s) {
        const float*& product = next[group.outgoing_owners()[s]];
        BestKernels().add_scaled(product, 0.125f, shape.hidden_size, residual.data() + s / top_k * hidden);
        product += hidden;
        moved += static_cast<double>(hidden * sizeof(float));
      }
      *bytes += moved;
    }
    if (step > 0) seconds.push_back((Now() - begin) / shape.num_layers);
  }
  *bytes /= shape.num_layers;
  return Median(seconds);
}

void RunSingle(const Options& options, const ModelConfig& config, Shared& shared) {
  CpuWeightsOptions load;
  load.quantization = Must(ParseQuantization(options.quantize));
  const RandomTensors source(7);
  const auto weights = Must(LoadCpuWeights(source, config, load));
  const auto one = Must(MakeCpuBackend(weights, BackendOf(options, 1)));
  const auto all = Must(MakeCpuBackend(weights, BackendOf(options, options.ranks)));
  Random random(1);
  for (size_t i = 0; i < options.rows.size(); ++i) {
    while (shared.turn != static_cast<int>(2 * i)) std::this_thread::sleep_for(std::chrono::milliseconds(1));
    shared.single_one[i] = TimeSteps(*one, options.rows[i], 0, 1, options.steps, random);
    shared.single_all[i] = TimeSteps(*all, options.rows[i], 0, 1, options.steps, random);
    ++shared.turn;
  }
}

StatusOr<std::unique_ptr<ExpertGroup>> Join(const Options& options, const RankGroupOptions& join,
                                            const std::string& directory) {
  if (!options.hosts) return JoinShmGroup(join, directory);
  server::NetGroupOptions net;
  for (int rank = 0; rank < options.ranks; ++rank)
    net.peers.push_back({"127.0.0.1", static_cast<uint16_t>(kFirstPort + rank)});
  net.listen = net.peers[static_cast<size_t>(join.rank)];
  net.rails = {"127.0.0.1:0"};
  return server::JoinNetGroup(join, net);
}

void RunRank(const Options& options, const ModelConfig& config, const std::string& directory, int rank,
             Shared& shared) {
  const LayerPlacement placement = InitialPlacement(config.num_experts, options.ranks, 0);
  CpuWeightsOptions load;
  load.quantization = Must(ParseQuantization(options.quantize));
  load.num_threads = 1;
  load.holds = [&](int32_t, int32_t e) { return (placement[static_cast<size_t>(e)] >> rank & 1) != 0; };
  const RandomTensors source(7);
  const auto weights = Must(LoadCpuWeights(source, config, load));
  CpuBackendOptions backend_options = BackendOf(options, 1);
  RankGroupOptions join;
  join.rank = rank;
  join.shape = Must(CpuGroupShape(*weights, backend_options, options.ranks, 1));
  join.held.assign(static_cast<size_t>(join.shape.num_layers), placement);
  const auto group = Must(Join(options, join, directory));
  backend_options.group.group = group.get();
  backend_options.group.source = &source;
  backend_options.group.rebalance_every = Duration::zero();
  const auto backend = Must(MakeCpuBackend(weights, backend_options));
  Random random(static_cast<uint64_t>(rank) + 1);
  for (size_t i = 0; i < options.rows.size(); ++i) {
    while (shared.turn != static_cast<int>(2 * i + 1))
      std::this_thread::sleep_for(std::chrono::milliseconds(1));
    const double step = TimeSteps(*backend, options.rows[i], rank, options.ranks, options.steps, random);
    double bytes = 0;
    const double exchange = TimeExchange(*group, placement, options.rows[i], options.steps, &bytes, random);
    if (rank == 0) {
      shared.group[i] = step;
      shared.exchange[i] = exchange;
      shared.bytes[i] = bytes * options.ranks;
      ++shared.turn;
    }
  }
  ++shared.done;
  while (shared.done < options.ranks) std::this_thread::sleep_for(std::chrono::milliseconds(1));
}

int Main(const Options& options) {
  const ModelConfig config = Must(ShapeNamed(options.shape, options.layers));
  void* const memory =
      mmap(nullptr, sizeof(Shared), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
  Shared& shared = *new (memory) Shared();
  const std::string directory = std::filesystem::path("/dev/shm") / RandomName("millrace-bench-");
  std::vector<pid_t> children;
  for (int i = 0; i <= options.ranks; ++i) {
    const pid_t pid = fork();
    if (pid == 0) {
      if (i == options.ranks) {
        RunSingle(options, config, shared);
      } else {
        RunRank(options, config, directory, i, shared);
      }
      _exit(0);
    }
    children.push_back(pid);
  }
  bool failed = false;
  for (const pid_t pid : children) {
    int status = 0;
    waitpid(pid, &status, 0);
    failed |= status != 0;
  }
  std::filesystem::remove_all(directory);
  if (failed) return 1;
  const double limit = bench::MeasureLimits(options.ranks).read_gb_per_s;
  fmt::print("{}, {} layers, {}: {} ranks of one thread against one process; memory {:.1f} GB/s\n",
             options.shape, config.num_layers, options.quantize, options.ranks, limit);
  fmt::print(
      "  rows   1 thread ms  {} threads ms   group ms   group/1 thread  group/{} threads | exchange us/layer "
      "  MB  "
      "  GB/s  share  of a step\n",
      options.ranks, options.ranks);
  const int moe_layers = config.num_layers - config.num_dense_layers;
  for (size_t i = 0; i < options.rows.size(); ++i) {
    const double rate = shared.bytes[i] / shared.exchange[i] / 1e9;
    fmt::print(
        "{:6} {:13.2f} {:13.2f} {:10.2f} {:14.2f} x {:14.2f} x | {:17.1f} {:6.2f} {:6.1f} {:4.0f} % {:6.1f} "
        "%\n",
        options.rows[i], 1e3 * shared.single_one[i], 1e3 * shared.single_all[i], 1e3 * shared.group[i],
        shared.single_one[i] / shared.group[i], shared.single_all[i] / shared.group[i],
        1e6 * shared.exchange[i], shared.bytes[i] / 1e6, rate, 100 * rate / limit,
        100 * shared.exchange[i] * moe_layers / shared.group[i]);
  }
  return 0;
}

}  // namespace
}  // namespace millrace::engine

int main(int argc, char** argv) {
  millrace::engine::Options options;
  CLI::App app("An expert group: its gain and its cost");
  app.add_option("--shape", options.shape, "ling-bench-s, ling-mini-e64 or ling-mini-2.0")
      ->capture_default_str();
  app.add_option("--layers", options.layers, "Keep only this many layers; 0 = all")->capture_default_str();
  app.add_option("--quantize", options.quantize, "none (bfloat16), int8 or int4")->capture_default_str();
  app.add_option("--ranks", options.ranks, "Processes of one thread")
      ->check(CLI::Range(1, 32))
      ->capture_default_str();
  app.add_option("--rows", options.rows, "Tokens in a step, all ranks together, at most 16 figures")
      ->delimiter(',')
      ->capture_default_str();
  app.add_flag(
      "--hosts", options.hosts,
      "Exchange as between hosts: over sockets and the transfer engine, on loopback ports from 27340");
  app.add_option("--steps", options.steps, "Timed steps")->capture_default_str();
  CLI11_PARSE(app, argc, argv);
  if (options.rows.size() > millrace::engine::kRowsMax) return 2;
  return millrace::engine::Main(options);
}
