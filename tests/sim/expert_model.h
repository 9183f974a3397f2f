#pragma once
// A model of expert groups that this machine is too small for: H200s in nodes of eight, NVLink inside a node,
// one RDMA rail per GPU between nodes. Routing is drawn from a skewed popularity of experts under the group
// limit of the Ling router; who holds an expert is decided by the placement that workers use.

#include <cstdint>
#include <string>

namespace millrace::sim {

struct ExpertModel {
  std::string name;
  int32_t num_layers = 0;  // MoE layers
  int32_t num_experts = 256;
  int32_t experts_per_token = 8;
  int32_t num_groups = 8;
  int32_t groups_per_token = 4;
  int32_t hidden_size = 0;
  double expert_bytes = 0;   // weights of one routed expert
  double fixed_seconds = 0;  // of a step: attention, shared expert, head, launches
};
ExpertModel LingMini();   // 2.0, fp8
ExpertModel LingFlash();  // 2.0, fp8

struct Interconnect {
  // A GPU's own limits: weights are read at memory speed; sent and received bytes count against each link.
  double memory_bytes_per_s = 4.3e12;
  double nvlink_bytes_per_s = 320e9;  // measured all-to-all, 8 GPUs
  double rdma_bytes_per_s = 45e9;     // one 400 Gbit/s rail
  double nvlink_seconds = 40e-6;      // a layer's dispatch and combine with next to no bytes
  double rdma_seconds = 190e-6;       // the same across nodes
  int32_t node_ranks = 8;
};

struct ExpertScenario {
  ExpertModel model;
  int32_t num_ranks = 8;
  int32_t rows_per_rank = 32;  // decode batch
  int32_t redundant = 0;       // slots per rank beyond an even share
  bool balance = false;        // placement from observed load; else consecutive experts
  bool group_aware = false;    // groups of experts stay on a node
  double skew = 0.7;           // popularity of the i-th expert of its layer ~ 1 / i^skew; 0 = even
  uint64_t seed = 1;
};

struct ExpertResult {
  double imbalance = 0;        // busiest rank's routed tokens over the mean, averaged over layers
  double nodes_per_token = 0;  // that a token is sent to
  double compute_seconds = 0;  // of a step: the slowest rank of each layer reads its experts
  double exchange_seconds = 0;
  double step_seconds = 0;
  double tokens_per_s_per_gpu = 0;
};
ExpertResult SimulateExperts(const ExpertScenario& scenario, const Interconnect& links);

}  // namespace millrace::sim
