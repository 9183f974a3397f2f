#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <chrono>
#include <string>

#include "tests/engine/cuda/ep/ep_layer.h"
#include "tests/engine/cuda/ep/tests.h"

namespace millrace::test {
namespace {

// On one device the processes take turns in slices of milliseconds.
constexpr int64_t kBound = 2'000'000'000;
constexpr int kSteps = 40;

LayerShape TwoRanks() {
  LayerShape shape;
  shape.ranks = 2;
  return shape;
}

bool SendAll(int fd, const void* data, size_t size) {
  return write(fd, data, size) == static_cast<ssize_t>(size);
}
bool ReceiveAll(int fd, void* data, size_t size) {
  auto* to = static_cast<char*>(data);
  while (size > 0) {
    const ssize_t got = read(fd, to, size);
    if (got <= 0) return false;
    to += got;
    size -= static_cast<size_t>(got);
  }
  return true;
}

// Exchanges handles of windows and connects `rank`. False if the other process went away.
bool ConnectAcross(LayerRank& here, int rank, int in_fd, int out_fd) {
  cudaIpcMemHandle_t mine, other;
  here.Use();
  CUDA_OK(cudaIpcGetMemHandle(&mine, here.exchange().window().data()));
  if (!SendAll(out_fd, &mine, sizeof(mine)) || !ReceiveAll(in_fd, &other, sizeof(other))) return false;
  void* window = nullptr;
  CUDA_OK(cudaIpcOpenMemHandle(&window, other, cudaIpcMemLazyEnablePeerAccess));
  std::byte* windows[2] = {};
  windows[1 - rank] = static_cast<std::byte*>(window);
  const LayerShape shape = TwoRanks();
  engine::cuda::Result result = here.exchange().Connect(windows);
  EXPECT(result.ok(), "%s", result.message().c_str());
  result = here.exchange().SetMembers(3, SpreadExperts(shape, 0).Table(shape, rank), 1);
  EXPECT(result.ok(), "%s", result.message().c_str());
  char ready = 1;  // neither runs before the other's table is set, so the bound measures steps only
  return SendAll(out_fd, &ready, 1) && ReceiveAll(in_fd, &ready, 1);
}

int DeviceOf(int rank) {
  int devices = 0;
  CUDA_OK(cudaGetDeviceCount(&devices));
  return rank % devices;
}

}  // namespace

int RunPeer(int in_fd, int out_fd) {
  const LayerShape shape = TwoRanks();
  const LayerWeights weights(shape, 20);
  LayerRank here(shape, weights, SpreadExperts(shape, 0).hosted[1], DeviceOf(1));
  here.MakeExchange(1, kBound, 2);
  if (!ConnectAcross(here, 1, in_fd, out_fd)) return 1;
  for (uint32_t step = 0;; ++step) {
    here.Set(MakeInputs(shape, Routing::kUniform, 800 + step % 4)[1]);
    here.Step();
    here.Synchronize();
    if (!here.exchange().Check().ok()) return 2;
  }
}

void TestProcesses(const char* program) {
  int to_peer[2], from_peer[2];
  if (pipe(to_peer) != 0 || pipe(from_peer) != 0) return;
  const pid_t peer = fork();  // before this process touches CUDA
  if (peer == 0) {
    const std::string in = std::to_string(to_peer[0]), out = std::to_string(from_peer[1]);
    close(to_peer[1]);
    close(from_peer[0]);
    execl(program, program, "peer", in.c_str(), out.c_str(), static_cast<char*>(nullptr));
    _exit(127);
  }
  close(to_peer[0]);
  close(from_peer[1]);
  signal(SIGPIPE, SIG_IGN);
  cudaDeviceProp properties;
  if (cudaGetDeviceProperties(&properties, 0) != cudaSuccess || properties.major != 9) {
    kill(peer, SIGKILL);
    waitpid(peer, nullptr, 0);
    std::printf("SKIPPED: no GPU of compute capability 9.0\n");
    std::exit(77);
  }
  const LayerShape shape = TwoRanks();
  const LayerWeights weights(shape, 20);
  const Placement placement = SpreadExperts(shape, 0);
  std::vector<int> all;
  for (int e = 0; e < shape.experts; ++e) all.push_back(e);
  LayerRank reference(shape, weights, all, DeviceOf(0));
  LayerRank here(shape, weights, placement.hosted[0], DeviceOf(0));
  here.MakeExchange(0, kBound, 2);
  std::vector<std::vector<RankInput>> inputs;
  std::vector<std::vector<std::vector<float>>> expected;
  for (uint32_t i = 0; i < 4; ++i) {
    inputs.push_back(MakeInputs(shape, Routing::kUniform, 800 + i));
    expected.push_back(ExpectedResiduals(shape, inputs.back(), placement, reference));
  }
  EXPECT(ConnectAcross(here, 0, from_peer[0], to_peer[1]), "the peer went away");
  const auto step = [&](int i) {
    here.Set(inputs[i % 4][0]);
    here.Step();
    here.Synchronize();
    return here.exchange().Check();
  };
  for (int i = 0; i < kSteps; ++i) {
    const engine::cuda::Result check = step(i);
    EXPECT(check.ok(), "step %d: %s", i, check.message().c_str());
    const std::vector<float> residual = here.Residual();
    EXPECT(std::memcmp(residual.data(), expected[i % 4][0].data(), residual.size() * sizeof(float)) == 0,
           "step %d: another residual", i);
  }
  kill(peer, SIGKILL);
  waitpid(peer, nullptr, 0);
  int after = 0;  // what the peer had launched before it died may still have run
  engine::cuda::Result check;
  const auto begin = std::chrono::steady_clock::now();
  while (check.ok() && after < 3) check = step(kSteps + after++);
  const double waited = std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
  EXPECT(check.message().find("rank 1 did not") != std::string::npos, "after the kill: %s",
         check.message().c_str());
  std::printf(
      "two processes, %d equal steps; the killed one was missed after %d steps, %.0f ms (bound of a wait "
      "%.0f)\n",
      kSteps, after, waited * 1e3, kBound / 1e6);
}

}  // namespace millrace::test
