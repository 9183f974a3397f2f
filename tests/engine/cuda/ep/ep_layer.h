#pragma once
// A small MoE layer over several ranks for the tests: ranks are streams of one process, on one device or on
// several. The reference is one rank's run of the same grouped products (whose rows do not depend on their
// batch) and a plain sum on the host in the order that kernels/ep_exchange.h states, so results must agree
// bit for bit.

#include <memory>
#include <random>
#include <vector>

#include "engine/backend/cuda/ep_exchange.h"
#include "tests/engine/cuda/hot/support.h"

namespace millrace::test {

struct LayerShape {
  int ranks = 4;
  int rows = 24;
  int rows_max = 40;
  int hidden = 256;
  int width = 128;
  int experts = 32;
  int top_k = 4;
  engine::cuda::EpPayload payload = engine::cuda::EpPayload::kBf16;
  bool e4m3() const { return payload == engine::cuda::EpPayload::kE4m3; }
};

// What one rank gives to a step.
struct RankInput {
  std::vector<Bf16> x;           // [rows, hidden]
  std::vector<int32_t> experts;  // [rows, top_k]; -1: none
  std::vector<float> weights;    // [rows, top_k]
  std::vector<float> residual;   // [rows, hidden]
  std::vector<Bf16> local;       // [rows, hidden]
};

enum class Routing { kUniform, kOneRank, kSkewed };
// Distinct experts per token; a rank's tokens from a random count on (all of every third rank's) choose
// nothing.
std::vector<RankInput> MakeInputs(const LayerShape& shape, Routing routing, uint32_t seed);

// Where experts are: hosted[rank] lists the experts whose weights the rank has, in the order of their numbers
// there.
struct Placement {
  std::vector<std::vector<int>> hosted;
  uint32_t alive = 0;
  // The table of one source rank: of several living replicas the one that its own number picks.
  std::vector<uint32_t> Table(const LayerShape& shape, int source) const;
};
// Expert e on rank e % ranks, and `replicas` more experts on every rank.
Placement SpreadExperts(const LayerShape& shape, int replicas);

// The weights of all experts on the host.
struct LayerWeights {
  LayerWeights(const LayerShape& shape, uint32_t seed);
  std::vector<uint8_t> gate_up, down;  // [experts] matrices, bf16 or e4m3
  std::vector<float> gate_up_scales, down_scales;
  std::vector<float> norm;
};

// One rank: its shard, buffers, stream and exchange. Also stands for the single rank of the reference.
class LayerRank {
 public:
  // `exchange` null: no exchange (the reference). Selects `device` while it lives on the calling thread.
  LayerRank(const LayerShape& shape, const LayerWeights& weights, const std::vector<int>& hosted, int device);
  ~LayerRank();
  void MakeExchange(int rank, int64_t timeout_ns, int ranks_on_device);
  void Set(const RankInput& input);  // copies to the device; poisons outputs
  // Launches; nothing waits.
  void Dispatch();
  void Serve();  // Receive and the experts
  void Return();
  void Combine();
  void Step() {
    Dispatch();
    Serve();
    Return();
    Combine();
  }
  void Synchronize();
  std::vector<float> Residual();
  std::vector<Bf16> Normed();
  // The experts' outputs of the input's own rows, [rows, top_k, hidden]: what a rank with all experts makes.
  std::vector<Bf16> ExpertOutputs();

  void Use() { CUDA_OK(cudaSetDevice(device_)); }
  int rows() const { return rows_; }
  void set_rows(int rows) { rows_ = rows; }
  cudaStream_t stream() const { return stream_; }
  engine::cuda::EpExchange& exchange() { return *exchange_; }

 private:
  void Experts(const void* tokens, const float* scales, int rows);

  const LayerShape shape_;
  const int device_;
  const int num_hosted_;
  int rows_;
  cudaStream_t stream_ = nullptr;
  std::unique_ptr<engine::cuda::EpExchange> exchange_;
  struct Buffers;
  std::unique_ptr<Buffers> b_;
};

// The residual streams that a step must end with, by rank.
std::vector<std::vector<float>> ExpectedResiduals(const LayerShape& shape,
                                                  const std::vector<RankInput>& inputs,
                                                  const Placement& placement, LayerRank& reference);

// All ranks of a group in this process, connected.
struct LayerGroup {
  LayerGroup(const LayerShape& shape, const LayerWeights& weights, const Placement& placement, int devices,
             int64_t timeout_ns);
  void SetMembers(const Placement& placement, uint32_t first_epoch);
  void Set(const std::vector<RankInput>& inputs);
  void Step();
  void Synchronize();
  LayerShape shape;
  std::vector<std::unique_ptr<LayerRank>> ranks;
};

}  // namespace millrace::test
