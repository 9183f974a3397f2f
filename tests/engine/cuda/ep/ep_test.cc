// The exchange between ranks of an expert-parallel group. Ranks are streams on one device ("virtual"), then
// spread over all devices of the machine if there are several, then two processes. Exit code 77: no GPU of
// compute capability 9.0 here, nothing was run.
#include <chrono>
#include <cstdlib>
#include <string>

#include "tests/engine/cuda/ep/ep_layer.h"
#include "tests/engine/cuda/ep/tests.h"

namespace millrace::test {
namespace {

constexpr int64_t kPatience = 10'000'000'000;  // where all ranks come
constexpr int64_t kBound = 300'000'000;        // where one does not

std::vector<int> AllExperts(const LayerShape& shape) {
  std::vector<int> all;
  for (int e = 0; e < shape.experts; ++e) all.push_back(e);
  return all;
}

bool SameBits(const std::vector<float>& a, const std::vector<float>& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0;
}

void ExpectStep(LayerGroup& group, const std::vector<RankInput>& inputs, const Placement& placement,
                LayerRank& reference, const LayerWeights& weights, const std::string& what) {
  const LayerShape& shape = group.shape;
  const auto expected = ExpectedResiduals(shape, inputs, placement, reference);
  for (int rank = 0; rank < shape.ranks; ++rank) {
    if ((placement.alive >> rank & 1) == 0) continue;
    LayerRank& here = *group.ranks[rank];
    const engine::cuda::Result check = here.exchange().Check();
    EXPECT(check.ok(), "%s rank %d: %s", what.c_str(), rank, check.message().c_str());
    const std::vector<float> residual = here.Residual();
    EXPECT(SameBits(residual, expected[rank]), "%s rank %d: another residual", what.c_str(), rank);
    const std::vector<Bf16> normed = here.Normed();
    Comparison comparison;
    for (int row = 0; row < shape.rows; ++row) {
      const float* x = residual.data() + size_t(row) * shape.hidden;
      double squares = 0;
      for (int c = 0; c < shape.hidden; ++c) squares += double(x[c]) * x[c];
      for (int c = 0; c < shape.hidden; ++c) {
        const double y = x[c] / std::sqrt(squares / shape.hidden + 1e-6) * weights.norm[c];
        comparison.Add(Value(normed[size_t(row) * shape.hidden + c]), y, std::fabs(y) * 0.0045 + 1e-6);
      }
    }
    EXPECT_CLOSE(comparison, 1e-5, what.c_str());
  }
}

void TestEqualsOneRank(int devices) {
  for (const auto payload : {engine::cuda::EpPayload::kBf16, engine::cuda::EpPayload::kE4m3}) {
    for (const int ranks : {1, 2, 3, 4, 8}) {
      LayerShape shape;
      shape.ranks = ranks;
      shape.payload = payload;
      const LayerWeights weights(shape, 7);
      LayerRank reference(shape, weights, AllExperts(shape), 0);
      for (const int replicas : {0, 5}) {
        const Placement placement = SpreadExperts(shape, replicas);
        LayerGroup group(shape, weights, placement, devices, kPatience);
        uint32_t seed = 100;
        for (const Routing routing :
             {Routing::kUniform, Routing::kOneRank, Routing::kSkewed, Routing::kUniform}) {
          const auto inputs = MakeInputs(shape, routing, ++seed);
          group.Set(inputs);
          group.Step();
          group.Synchronize();
          ExpectStep(group, inputs, placement, reference, weights,
                     std::string(shape.e4m3() ? "e4m3" : "bf16") + ", " + std::to_string(ranks) +
                         " ranks, routing " + std::to_string(static_cast<int>(routing)));
        }
      }
    }
  }
}

// Other numbers of rows in the same window, up to all of it; a single row.
void TestOtherRows(int devices) {
  LayerShape shape;
  const LayerWeights weights(shape, 8);
  LayerRank reference(shape, weights, AllExperts(shape), 0);
  const Placement placement = SpreadExperts(shape, 0);
  LayerGroup group(shape, weights, placement, devices, kPatience);
  for (const int rows : {40, 1, 24, 7}) {
    group.shape.rows = rows;
    for (auto& rank : group.ranks) rank->set_rows(rows);
    reference.set_rows(rows);
    const auto inputs = MakeInputs(group.shape, Routing::kUniform, 300 + rows);
    group.Set(inputs);
    group.Step();
    group.Synchronize();
    ExpectStep(group, inputs, placement, reference, weights, std::to_string(rows) + " rows");
  }
}

void TestGraphs(int devices) {
  LayerShape shape;
  const LayerWeights weights(shape, 9);
  LayerRank reference(shape, weights, AllExperts(shape), 0);
  const Placement placement = SpreadExperts(shape, 2);
  LayerGroup group(shape, weights, placement, devices, kPatience);
  std::vector<cudaGraphExec_t> graphs(shape.ranks);
  for (int rank = 0; rank < shape.ranks; ++rank) {
    LayerRank& here = *group.ranks[rank];
    here.Use();
    CUDA_OK(cudaStreamBeginCapture(here.stream(), cudaStreamCaptureModeThreadLocal));
    here.Step();
    cudaGraph_t graph = nullptr;
    CUDA_OK(cudaStreamEndCapture(here.stream(), &graph));
    CUDA_OK(cudaGraphInstantiate(&graphs[rank], graph, 0));
    CUDA_OK(cudaGraphDestroy(graph));
  }
  const auto replay = [&] {
    for (int rank = 0; rank < shape.ranks; ++rank) {
      group.ranks[rank]->Use();
      CUDA_OK(cudaGraphLaunch(graphs[rank], group.ranks[rank]->stream()));
    }
  };
  for (uint32_t i = 0; i < 5; ++i) {
    const auto inputs = MakeInputs(shape, i % 2 == 0 ? Routing::kUniform : Routing::kSkewed, 400 + i);
    group.Set(inputs);
    replay();
    group.Synchronize();
    ExpectStep(group, inputs, placement, reference, weights, "graph");
  }
  // Many without the host between them: ranks run apart as far as the protocol lets them.
  for (int i = 0; i < 500; ++i) replay();
  group.Synchronize();
  const auto inputs = MakeInputs(shape, Routing::kUniform, 500);
  group.Set(inputs);
  replay();
  group.Synchronize();
  ExpectStep(group, inputs, placement, reference, weights, "after 500 replays");
  for (const cudaGraphExec_t graph : graphs) CUDA_OK(cudaGraphExecDestroy(graph));
}

// One rank stops before its Dispatch, or before its Return: the others end within the bound and name it, then
// go on without it. It wakes up late and writes what it had to say: nothing changes.
void TestDeadRank(int devices, bool after_dispatch) {
  LayerShape shape;
  const LayerWeights weights(shape, 10);
  LayerRank reference(shape, weights, AllExperts(shape), 0);
  const Placement everywhere = SpreadExperts(shape, shape.experts);
  LayerGroup group(shape, weights, everywhere, devices, kBound);
  constexpr int kDead = 2;
  const auto first = MakeInputs(shape, Routing::kUniform, 600);
  group.Set(first);
  const auto begin = std::chrono::steady_clock::now();
  for (int rank = 0; rank < shape.ranks; ++rank) {
    if (rank != kDead) {
      // Two steps, as a captured graph of two layers would: the second must not wait again.
      group.ranks[rank]->Step();
      group.ranks[rank]->Step();
    } else if (after_dispatch) {
      group.ranks[rank]->Dispatch();
    }
  }
  group.Synchronize();
  const double waited = std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
  std::printf("a rank that stops %s its dispatch: %.1f ms until all others ended, bound of a wait %.1f ms\n",
              after_dispatch ? "after" : "before", waited * 1e3, kBound / 1e6);
  const std::string phase = after_dispatch ? "did not return its sums" : "did not dispatch";
  for (int rank = 0; rank < shape.ranks; ++rank) {
    if (rank == kDead) continue;
    const engine::cuda::Result check = group.ranks[rank]->exchange().Check();
    EXPECT(check.message().find("rank 2 " + phase) != std::string::npos, "rank %d said: %s", rank,
           check.message().c_str());
    EXPECT(group.ranks[rank]->exchange().missing() == 1u << kDead, "rank %d misses %#x", rank,
           group.ranks[rank]->exchange().missing());
  }
  Placement survivors = everywhere;
  survivors.alive &= ~(1u << kDead);
  group.SetMembers(survivors, 1000);
  for (uint32_t i = 0; i < 3; ++i) {
    const auto inputs = MakeInputs(shape, Routing::kUniform, 610 + i);
    group.Set(inputs);
    if (i == 1) group.ranks[kDead]->Step();  // it still believes in the old epoch and waits for it in vain
    for (int rank = 0; rank < shape.ranks; ++rank) {
      if (rank != kDead) group.ranks[rank]->Step();
    }
    group.Synchronize();
    ExpectStep(group, inputs, survivors, reference, weights, "survivors");
  }
}

void TestRowsDiffer(int devices) {
  LayerShape shape;
  shape.ranks = 2;
  const LayerWeights weights(shape, 11);
  const Placement placement = SpreadExperts(shape, 0);
  LayerGroup group(shape, weights, placement, devices, kBound);
  group.Set(MakeInputs(shape, Routing::kUniform, 700));
  group.ranks[1]->set_rows(8);
  group.Step();
  group.Synchronize();
  for (int rank = 0; rank < 2; ++rank) {
    const engine::cuda::Result check = group.ranks[rank]->exchange().Check();
    EXPECT(check.message().find("another number of rows") != std::string::npos, "rank %d said: %s", rank,
           check.message().c_str());
  }
}

void TestRefusals() {
  LayerShape shape;
  const LayerWeights weights(shape, 12);
  const Placement placement = SpreadExperts(shape, 0);
  LayerGroup group(shape, weights, placement, 1, kBound);
  engine::cuda::EpExchange& exchange = group.ranks[0]->exchange();
  const auto table = placement.Table(shape, 0);
  EXPECT(!exchange.SetMembers(0xe, table, 5).ok(), "a group without this rank was taken");
  EXPECT(!exchange.SetMembers(0x3, table, 5).ok(), "experts on ranks that take no part were taken");
  EXPECT(!exchange.Dispatch(nullptr, nullptr, nullptr, shape.rows_max + 1, nullptr).ok(),
         "too many rows were taken");
}

}  // namespace
}  // namespace millrace::test

int main(int argc, char** argv) {
  using namespace millrace::test;  // NOLINT: this is their main
  // Ranks of one process wait for each other on the device; loading a kernel while one waits could wait for
  // it.
  setenv("CUDA_MODULE_LOADING", "EAGER", 1);
  setenv("CUDA_DEVICE_MAX_CONNECTIONS", "32", 1);  // a queue per rank's stream
  if (argc == 4 && std::string(argv[1]) == "peer") return RunPeer(std::atoi(argv[2]), std::atoi(argv[3]));
  if (argc == 2 && std::string(argv[1]) == "processes") {
    TestProcesses(argv[0]);
  } else {
    cudaDeviceProp properties;
    if (cudaGetDeviceProperties(&properties, 0) != cudaSuccess || properties.major != 9) {
      std::printf("SKIPPED: no GPU of compute capability 9.0\n");
      return 77;
    }
    int devices = 0;
    CUDA_OK(cudaGetDeviceCount(&devices));
    for (int a = 0; a < devices; ++a) {
      CUDA_OK(cudaSetDevice(a));
      for (int b = 0; b < devices; ++b) {
        if (a != b) CUDA_OK(cudaDeviceEnablePeerAccess(b, 0));
      }
    }
    for (const int spread : {1, devices}) {
      if (spread == devices && devices == 1 && checks > 0) break;
      std::printf("ranks on %d device%s\n", spread, spread == 1 ? "" : "s");
      TestEqualsOneRank(spread);
      TestOtherRows(spread);
      TestGraphs(spread);
      TestDeadRank(spread, false);
      TestDeadRank(spread, true);
      TestRowsDiffer(spread);
    }
    TestRefusals();
  }
  std::printf("%d checks, %d failed\n", checks, failures);
  return failures == 0 && checks > 0 ? 0 : 1;
}
