// Prints what the model says of expert groups of 1 to 64 GPUs: expert_report
#include <fmt/format.h>

#include "tests/sim/expert_model.h"

int main() {
  using namespace millrace::sim;
  const Interconnect links;
  for (const ExpertModel& model : {LingMini(), LingFlash()}) {
    fmt::print("{}, decode, 32 tokens per GPU; nodes of 8 GPUs, NVLink {:.0f} GB/s, RDMA {:.0f} GB/s\n",
               model.name, links.nvlink_bytes_per_s / 1e9, links.rdma_bytes_per_s / 1e9);
    fmt::print(
        "ranks  placement            imbalance  nodes/token  experts ms  exchange ms  step ms  "
        "tokens/s/GPU\n");
    for (const int ranks : {1, 8, 16, 32, 64}) {
      struct Row {
        const char* name;
        int redundant;
        bool balance, group_aware;
      };
      for (const Row& row :
           {Row{"consecutive", 0, false, false}, Row{"balanced", 0, true, false},
            Row{"balanced + 2 copies", 2, true, false}, Row{"by node + 2 copies", 2, true, true}}) {
        if (ranks == 1 && row.balance) continue;
        if (ranks == 8 && row.group_aware) continue;
        ExpertScenario scenario;
        scenario.model = model;
        scenario.num_ranks = ranks;
        scenario.redundant = row.redundant;
        scenario.balance = row.balance;
        scenario.group_aware = row.group_aware;
        const ExpertResult r = SimulateExperts(scenario, links);
        fmt::print("{:5}  {:20} {:9.2f} {:12.2f} {:11.2f} {:12.2f} {:8.2f} {:13.0f}\n", ranks, row.name,
                   r.imbalance, r.nodes_per_token, 1e3 * r.compute_seconds, 1e3 * r.exchange_seconds,
                   1e3 * r.step_seconds, r.tokens_per_s_per_gpu);
      }
    }
  }
  return 0;
}
