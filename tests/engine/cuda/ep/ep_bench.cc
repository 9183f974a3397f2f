// ep_bench [FILE]: time and bytes of one exchange (dispatch, receive, return, combine; no experts between) on
// Ling's shapes, several virtual ranks on one GPU and a rank per GPU if there are two or four; JSON to FILE.
#include <algorithm>
#include <cstdlib>
#include <fstream>
#include <memory>
#include <string>

#include "engine/backend/cuda/ep_exchange.h"
#include "tests/engine/cuda/hot/support.h"

namespace millrace::test {
namespace {

using engine::cuda::EpExchange;
using engine::cuda::EpPayload;
using engine::cuda::EpPlace;
using engine::cuda::Result;

constexpr int kExperts = 256, kTopK = 8, kGroups = 8, kGroupsPerToken = 4;
constexpr int kExchanges = 20;  // of one graph: a step's worth of layers
constexpr int kRuns = 11;

struct Case {
  int ranks, devices, rows, hidden;
  EpPayload payload;
};

void Check(const Result& result) {
  if (result.ok()) return;
  std::printf("FAIL %s\n", result.message().c_str());
  std::exit(1);
}

struct Bytes {
  double dispatched = 0;       // a rank's tokens, scales, choices, into all windows
  double returned = 0;         // a rank's sums, into all windows
  double dispatched_away = 0;  // of those, into other ranks' windows
  double returned_away = 0;
  double memory = 0;  // all that one rank reads and writes, its own share of others' stores left out
};

class Rank {
 public:
  Rank(const Case& c, int rank, Bytes* bytes) : case_(c), rank_(rank), device_(rank % c.devices) {
    Use();
    CUDA_OK(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking));
    engine::cuda::EpExchangeOptions options;
    options.shape = {c.ranks, c.rows, c.hidden, kTopK, c.payload};
    options.rank = rank;
    options.num_experts = kExperts;
    options.timeout_ns = 5'000'000'000;
    options.ranks_on_device = c.ranks / c.devices;
    Check(EpExchange::Create(options, &exchange_));
    const size_t rows = c.rows;
    const size_t values = rows * c.hidden;
    x_ = std::make_unique<Device<Bf16>>(Normal(values, 1.0f, 1 + rank));
    expert_out_ = std::make_unique<Device<Bf16>>(values * c.ranks * kTopK);
    const std::vector<Bf16> some = Normal(1 << 20, 1.0f, 2 + rank);
    for (size_t at = 0; at + some.size() <= expert_out_->size(); at += some.size()) {
      CUDA_OK(cudaMemcpy(expert_out_->get() + at, some.data(), some.size() * 2, cudaMemcpyHostToDevice));
    }
    residual_ = std::make_unique<Device<float>>(values);
    residual_->Zero();
    normed_ = std::make_unique<Device<Bf16>>(values);
    norm_ = std::make_unique<Device<float>>(std::vector<float>(c.hidden, 1.0f));
    experts_ = std::make_unique<Device<int32_t>>(Route(bytes));
    weights_ = std::make_unique<Device<float>>(std::vector<float>(rows * kTopK, 0.1f));
    served_experts_ = std::make_unique<Device<int32_t>>(rows * c.ranks * kTopK);
    served_weights_ = std::make_unique<Device<float>>(rows * c.ranks * kTopK);
    valid_rows_ = std::make_unique<Device<int32_t>>(1);
  }
  ~Rank() {
    Use();
    if (graph_ != nullptr) cudaGraphExecDestroy(graph_);
    exchange_.reset();
    cudaStreamDestroy(stream_);
  }

  void Connect(std::vector<std::unique_ptr<Rank>>& ranks) {
    Use();
    std::vector<std::byte*> windows;
    for (auto& rank : ranks) windows.push_back(rank->exchange_->window().data());
    Check(exchange_->Connect(windows));
    std::vector<uint32_t> places;
    for (int e = 0; e < kExperts; ++e) {
      const int each = kExperts / case_.ranks;
      places.push_back(EpPlace(e / each, e % each));
    }
    Check(exchange_->SetMembers((1u << case_.ranks) - 1, places, 1));
  }

  void Dispatch() {
    Check(exchange_->Dispatch(x_->get(), experts_->get(), weights_->get(), case_.rows, stream_));
    Check(exchange_->Receive(served_experts_->get(), served_weights_->get(), valid_rows_->get(), case_.rows,
                             stream_));
  }
  void Combine() {
    Check(exchange_->Return(expert_out_->get(), case_.rows, stream_));
    engine::cuda::EpCombineArgs args;
    args.experts = experts_->get();
    args.residual = residual_->get();
    args.norm_weight = norm_->get();
    args.normed = normed_->get();
    args.rows = case_.rows;
    args.eps = 1e-6f;
    Check(exchange_->Combine(args, stream_));
  }

  void Capture() {
    Use();
    CUDA_OK(cudaStreamBeginCapture(stream_, cudaStreamCaptureModeThreadLocal));
    for (int i = 0; i < kExchanges; ++i) {
      Dispatch();
      Combine();
    }
    cudaGraph_t graph = nullptr;
    CUDA_OK(cudaStreamEndCapture(stream_, &graph));
    CUDA_OK(cudaGraphInstantiate(&graph_, graph, 0));
    CUDA_OK(cudaGraphDestroy(graph));
  }
  void Replay() {
    Use();
    CUDA_OK(cudaGraphLaunch(graph_, stream_));
  }
  void CheckDone() {
    Use();
    CUDA_OK(cudaStreamSynchronize(stream_));
    Check(exchange_->Check());
  }
  void Use() { CUDA_OK(cudaSetDevice(device_)); }
  cudaStream_t stream() const { return stream_; }

 private:
  // Group-limited uniform routing, and the bytes that it makes this rank send.
  std::vector<int32_t> Route(Bytes* bytes) {
    std::mt19937 engine(77 + rank_);
    const double payload =
        case_.payload == EpPayload::kE4m3 ? case_.hidden * (1 + 4.0 / 128) : case_.hidden * 2.0;
    std::vector<int32_t> experts;
    for (int row = 0; row < case_.rows; ++row) {
      std::vector<int> groups(kGroups);
      for (int g = 0; g < kGroups; ++g) groups[g] = g;
      std::shuffle(groups.begin(), groups.end(), engine);
      std::vector<int> in_groups;
      for (int g = 0; g < kGroupsPerToken; ++g) {
        for (int e = 0; e < kExperts / kGroups; ++e)
          in_groups.push_back(groups[g] * (kExperts / kGroups) + e);
      }
      std::shuffle(in_groups.begin(), in_groups.end(), engine);
      uint32_t targets = 0;
      for (int j = 0; j < kTopK; ++j) {
        experts.push_back(in_groups[j]);
        targets |= 1u << (in_groups[j] / (kExperts / case_.ranks));
      }
      const double copies = __builtin_popcount(targets);
      const double away = copies - (targets >> rank_ & 1);
      const double choices = 8.0 * kTopK;
      bytes->dispatched += copies * (payload + choices) + 4.0 * case_.ranks;
      bytes->dispatched_away += away * (payload + choices) + 4.0 * (case_.ranks - 1);
      bytes->returned += copies * case_.hidden * 2.0;
      bytes->returned_away += away * case_.hidden * 2.0;
      // x; tokens written; outputs read (as many as are sent out, on average); sums written and read;
      // residual twice; the normed row.
      bytes->memory += case_.hidden * (2.0 + 2.0 * kTopK + copies * 4.0 + 8.0 + 2.0) + copies * payload;
    }
    return experts;
  }

  const Case case_;
  const int rank_;
  const int device_;
  cudaStream_t stream_ = nullptr;
  cudaGraphExec_t graph_ = nullptr;
  std::unique_ptr<EpExchange> exchange_;
  std::unique_ptr<Device<Bf16>> x_, expert_out_, normed_;
  std::unique_ptr<Device<float>> residual_, norm_, weights_, served_weights_;
  std::unique_ptr<Device<int32_t>> experts_, served_experts_, valid_rows_;
};

struct Times {
  double median = 0, low = 0, high = 0;
};
Times Summarise(std::vector<double> seconds) {
  std::sort(seconds.begin(), seconds.end());
  return {seconds[seconds.size() / 2], seconds.front(), seconds.back()};
}

double Elapsed(cudaEvent_t from, cudaEvent_t to) {
  float milliseconds = 0;
  CUDA_OK(cudaEventElapsedTime(&milliseconds, from, to));
  return milliseconds / 1e3;
}

// Copy rate between device memories: [0] within device 0 (bytes read plus written), [1] from device 0 to 1
// while 1 to 0 runs too (bytes of one direction); 0 without a second device.
void MeasureCeilings(int devices, double (&bytes_per_second)[2]) {
  constexpr size_t kBytes = size_t{1} << 30;
  std::vector<std::unique_ptr<Device<uint8_t>>> from, to;
  std::vector<cudaStream_t> streams(devices);
  for (int d = 0; d < devices; ++d) {
    CUDA_OK(cudaSetDevice(d));
    CUDA_OK(cudaStreamCreateWithFlags(&streams[d], cudaStreamNonBlocking));
    from.push_back(std::make_unique<Device<uint8_t>>(kBytes));
    to.push_back(std::make_unique<Device<uint8_t>>(kBytes));
  }
  for (int kind = 0; kind < 2; ++kind) {
    bytes_per_second[kind] = 0;
    if (kind >= devices) continue;
    std::vector<double> seconds;
    CUDA_OK(cudaSetDevice(0));
    cudaEvent_t begin, end;
    CUDA_OK(cudaEventCreate(&begin));
    CUDA_OK(cudaEventCreate(&end));
    for (int run = 0; run < 5; ++run) {
      CUDA_OK(cudaSetDevice(0));
      CUDA_OK(cudaEventRecord(begin, streams[0]));
      CUDA_OK(cudaMemcpyAsync(to[kind]->get(), from[0]->get(), kBytes, cudaMemcpyDeviceToDevice, streams[0]));
      CUDA_OK(cudaEventRecord(end, streams[0]));
      if (kind == 1) {
        CUDA_OK(cudaSetDevice(1));
        CUDA_OK(cudaMemcpyAsync(to[0]->get(), from[1]->get(), kBytes, cudaMemcpyDeviceToDevice, streams[1]));
        CUDA_OK(cudaStreamSynchronize(streams[1]));
      }
      CUDA_OK(cudaEventSynchronize(end));
      seconds.push_back(Elapsed(begin, end));
    }
    bytes_per_second[kind] = (kind == 0 ? 2.0 : 1.0) * kBytes / Summarise(seconds).median;
  }
}

std::string Run(const Case& c, const double (&ceilings)[2]) {
  Bytes bytes;
  std::vector<std::unique_ptr<Rank>> ranks;
  for (int rank = 0; rank < c.ranks; ++rank) ranks.push_back(std::make_unique<Rank>(c, rank, &bytes));
  for (auto& rank : ranks) rank->Connect(ranks);
  for (auto& rank : ranks) rank->Capture();
  Rank& first = *ranks[0];
  first.Use();
  cudaEvent_t events[3];
  for (cudaEvent_t& event : events) CUDA_OK(cudaEventCreate(&event));
  std::vector<double> whole, dispatch, combine;
  for (int run = 0; run < kRuns + 2; ++run) {
    first.Use();
    CUDA_OK(cudaEventRecord(events[0], first.stream()));
    for (auto& rank : ranks) rank->Replay();
    first.Use();
    CUDA_OK(cudaEventRecord(events[1], first.stream()));
    for (auto& rank : ranks) rank->CheckDone();
    if (run >= 2) whole.push_back(Elapsed(events[0], events[1]) / kExchanges);
  }
  // Halves, launched one by one: told apart only where they take longer than launches do.
  for (int run = 0; run < kRuns; ++run) {
    for (int i = 0; i < 3; ++i) {  // two of them bring the ranks into step
      if (i == 2) {
        first.Use();
        CUDA_OK(cudaEventRecord(events[0], first.stream()));
      }
      for (auto& rank : ranks) {
        rank->Use();
        rank->Dispatch();
      }
      if (i == 2) {
        first.Use();
        CUDA_OK(cudaEventRecord(events[1], first.stream()));
      }
      for (auto& rank : ranks) {
        rank->Use();
        rank->Combine();
      }
    }
    first.Use();
    CUDA_OK(cudaEventRecord(events[2], first.stream()));
    for (auto& rank : ranks) rank->CheckDone();
    dispatch.push_back(Elapsed(events[0], events[1]));
    combine.push_back(Elapsed(events[1], events[2]));
  }
  for (const cudaEvent_t event : events) CUDA_OK(cudaEventDestroy(event));
  const Times t = Summarise(whole);
  const bool link = c.devices > 1;
  // On one device all ranks share the memory; across devices each link direction carries one rank's bytes
  // away.
  const double away = (bytes.dispatched_away + bytes.returned_away) / c.ranks;
  const double memory = bytes.memory / c.devices;
  const double bound = std::max(memory / ceilings[0], link ? away / ceilings[1] : 0);
  const double d = Summarise(dispatch).median, r = Summarise(combine).median;
  std::printf(
      "%d ranks on %d GPU%s, hidden %d, %s, %4d rows: %8.2f us (%.2f..%.2f) an exchange, away %7.3f MB a "
      "rank, "
      "%5.1f GB/s, %4.1f %% of the %s bound; apart: %.1f + %.1f us\n",
      c.ranks, c.devices, link ? "s" : "", c.hidden, c.payload == EpPayload::kE4m3 ? "e4m3" : "bf16", c.rows,
      t.median * 1e6, t.low * 1e6, t.high * 1e6, away / 1e6, away / t.median / 1e9, 100 * bound / t.median,
      link && away / ceilings[1] >= memory / ceilings[0] ? "link" : "memory", d * 1e6, r * 1e6);
  std::fflush(stdout);
  char text[512];
  std::snprintf(
      text, sizeof(text),
      "{\"ranks\": %d, \"gpus\": %d, \"hidden\": %d, \"payload\": \"%s\", \"rows\": %d, \"microseconds\": "
      "%.2f, \"low\": %.2f, \"high\": %.2f, \"dispatched_away\": %.0f, \"returned_away\": %.0f, "
      "\"memory_bytes\": %.0f, \"dispatch_microseconds\": %.2f, \"combine_microseconds\": %.2f, "
      "\"bound_fraction\": %.4f}",
      c.ranks, c.devices, c.hidden, c.payload == EpPayload::kE4m3 ? "e4m3" : "bf16", c.rows, t.median * 1e6,
      t.low * 1e6, t.high * 1e6, bytes.dispatched_away / c.ranks, bytes.returned_away / c.ranks, memory,
      d * 1e6, r * 1e6, bound / t.median);
  return text;
}

}  // namespace
}  // namespace millrace::test

int main(int argc, char** argv) {
  using namespace millrace::test;             // NOLINT: this is their main
  setenv("CUDA_MODULE_LOADING", "EAGER", 1);  // as in the tests
  setenv("CUDA_DEVICE_MAX_CONNECTIONS", "32", 1);
  cudaDeviceProp properties;
  if (cudaGetDeviceProperties(&properties, 0) != cudaSuccess || properties.major != 9) {
    std::printf("SKIPPED: no GPU of compute capability 9.0\n");
    return 77;
  }
  int devices = 0;
  CUDA_OK(cudaGetDeviceCount(&devices));
  devices = devices >= 4 ? 4 : std::min(devices, 2);
  for (int d = 0; d < devices; ++d) {
    CUDA_OK(cudaSetDevice(d));
    for (int peer = 0; peer < devices; ++peer) {
      if (peer != d) CUDA_OK(cudaDeviceEnablePeerAccess(peer, 0));
    }
  }
  double ceilings[2];
  MeasureCeilings(std::min(devices, 2), ceilings);
  std::printf("%s x %d: copy %.2f TB/s, GPU to GPU with both directions busy %.1f GB/s each\n",
              properties.name, devices, ceilings[0] / 1e12, ceilings[1] / 1e9);
  std::string entries;
  const auto run = [&](const Case& c) { entries += (entries.empty() ? "\n  " : ",\n  ") + Run(c, ceilings); };
  for (const EpPayload payload : {EpPayload::kE4m3, EpPayload::kBf16}) {
    for (const int rows : {1, 8, 32, 128, 512, 2048}) {
      for (int each = 2; each <= devices; each *= 2) {  // a rank per GPU
        run({each, each, rows, 2048, payload});
        if (rows >= 128) run({each, each, rows, 4096, payload});
      }
      run({2, 1, rows, 2048, payload});
      if (payload == EpPayload::kE4m3) run({4, 1, rows, 2048, payload});
      if (payload == EpPayload::kE4m3 && rows <= 512) run({8, 1, rows, 2048, payload});
    }
  }
  if (argc > 1) {
    std::ofstream(argv[1]) << "{\"device\": \"" << properties.name << "\", \"gpus\": " << devices
                           << ", \"copy_bytes_per_second\": " << ceilings[0]
                           << ", \"link_bytes_per_second\": " << ceilings[1] << ",\n \"entries\": ["
                           << entries << "\n]}\n";
  }
  return failures == 0 ? 0 : 1;
}
