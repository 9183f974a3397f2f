// The model of large expert groups against what can be said without it.
#include "tests/sim/expert_model.h"

#include <gtest/gtest.h>

namespace millrace::sim {
namespace {

ExpertScenario Of(int32_t ranks, bool balance, int32_t redundant) {
  ExpertScenario scenario;
  scenario.model = LingFlash();
  scenario.model.num_layers = 4;
  scenario.num_ranks = ranks;
  scenario.balance = balance;
  scenario.redundant = redundant;
  return scenario;
}

TEST(ExpertModel, BalanceEvensTheLoadAtEverySize) {
  for (const int32_t ranks : {8, 16, 32, 64}) {
    const double before = SimulateExperts(Of(ranks, false, 0), {}).imbalance;
    const double moved = SimulateExperts(Of(ranks, true, 0), {}).imbalance;
    const double copied = SimulateExperts(Of(ranks, true, 2), {}).imbalance;
    EXPECT_LT(moved, before) << ranks;
    EXPECT_LT(copied, moved) << ranks;
  }
}

// 256 (1 - (31/32)^B) distinct experts, from gpu-independent counting, for even routing.
TEST(ExpertModel, OneRankReadsWhatTheFormulaSays) {
  ExpertScenario scenario = Of(1, false, 0);
  scenario.skew = 0;
  const Interconnect links;
  const ExpertResult result = SimulateExperts(scenario, links);
  const double expected = 4 * 163.3 * scenario.model.expert_bytes / links.memory_bytes_per_s;
  EXPECT_NEAR(result.compute_seconds, expected, 0.06 * expected);
  EXPECT_EQ(result.exchange_seconds, 0);
}

TEST(ExpertModel, GroupsOnTheirNodeSaveNodes) {
  ExpertScenario scenario = Of(64, true, 2);
  const double anywhere = SimulateExperts(scenario, {}).nodes_per_token;
  scenario.group_aware = true;
  const double by_node = SimulateExperts(scenario, {}).nodes_per_token;
  EXPECT_LE(by_node, 4.0);  // of 8 nodes with one group each
  EXPECT_GT(anywhere, by_node);
}

TEST(ExpertModel, ASeedReplays) {
  EXPECT_EQ(SimulateExperts(Of(16, true, 1), {}).step_seconds,
            SimulateExperts(Of(16, true, 1), {}).step_seconds);
}

}  // namespace
}  // namespace millrace::sim
