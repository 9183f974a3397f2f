#include "tests/sim/expert_model.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <numeric>
#include <vector>

#include "base/random.h"
#include "engine/moe/expert_placement.h"

namespace millrace::sim {
namespace {

constexpr int kObserved = 64;  // steps whose load the placement is made from

// Experts of one layer with their popularity, and draws of a token's choice from it.
class LayerRouting {
 public:
  LayerRouting(const ExpertModel& model, double skew, Random& random) : model_(model) {
    std::vector<int32_t> order(static_cast<size_t>(model.num_experts));
    std::iota(order.begin(), order.end(), 0);
    for (size_t i = order.size(); i > 1; --i) std::swap(order[i - 1], order[random.Below(i)]);
    log_weight_.resize(order.size());
    for (size_t i = 0; i < order.size(); ++i) {
      log_weight_[static_cast<size_t>(order[i])] = -skew * std::log(static_cast<double>(i) + 1);
    }
  }

  // Gumbel noise on the log-popularity, then the router's rule: the groups whose two best add up to most, and
  // the best experts of those.
  void Draw(Random& random, std::vector<int32_t>* chosen) const {
    const auto experts = log_weight_.size();
    const size_t groups = static_cast<size_t>(model_.num_groups);
    const size_t size = experts / groups;
    std::vector<double> score(experts);
    for (size_t e = 0; e < experts; ++e)
      score[e] = log_weight_[e] - std::log(-std::log(1 - random.Uniform()));
    std::vector<std::pair<double, size_t>> rank(groups);
    for (size_t g = 0; g < groups; ++g) {
      double first = -INFINITY, second = -INFINITY;
      for (size_t e = g * size; e < (g + 1) * size; ++e) {
        if (score[e] > first) {
          second = first;
          first = score[e];
        } else {
          second = std::max(second, score[e]);
        }
      }
      rank[g] = {-(first + second), g};
    }
    std::sort(rank.begin(), rank.end());
    std::vector<std::pair<double, int32_t>> best;
    for (size_t g = 0; g < static_cast<size_t>(model_.groups_per_token); ++g) {
      for (size_t e = rank[g].second * size; e < (rank[g].second + 1) * size; ++e) {
        best.emplace_back(-score[e], static_cast<int32_t>(e));
      }
    }
    std::partial_sort(best.begin(), best.begin() + model_.experts_per_token, best.end());
    chosen->clear();
    for (int32_t k = 0; k < model_.experts_per_token; ++k)
      chosen->push_back(best[static_cast<size_t>(k)].second);
  }

 private:
  const ExpertModel& model_;
  std::vector<double> log_weight_;
};

engine::LayerPlacement Place(const ExpertScenario& s, const Interconnect& links,
                             const std::vector<double>& load) {
  if (!s.balance) return engine::InitialPlacement(s.model.num_experts, s.num_ranks, s.redundant);
  engine::BalanceShape shape;
  shape.num_ranks = s.num_ranks;
  shape.slots_per_rank = (s.model.num_experts + s.num_ranks - 1) / s.num_ranks + s.redundant;
  if (s.group_aware && s.num_ranks > links.node_ranks) {
    shape.num_nodes = s.num_ranks / links.node_ranks;
    shape.num_groups = s.model.num_groups;
  }
  return engine::BalancedPlacement(load, shape);
}

struct LayerCost {
  double imbalance = 0, nodes = 0, compute = 0, exchange = 0;
};

LayerCost RunLayer(const ExpertScenario& s, const Interconnect& links, const LayerRouting& routing,
                   const engine::LayerPlacement& placement, Random& random) {
  const auto ranks = static_cast<size_t>(s.num_ranks);
  const auto node_of = [&](size_t rank) { return rank / static_cast<size_t>(links.node_ranks); };
  std::vector<double> rows(ranks), nvlink(ranks), rdma(ranks);
  std::vector<std::vector<char>> touched(ranks, std::vector<char>(static_cast<size_t>(s.model.num_experts)));
  // One copy per token and rank: fp8 with scales out, bf16 partial sums back. Both directions count at both
  // ends.
  const double bytes = s.model.hidden_size * (1.03 + 2);
  double nodes = 0;
  std::vector<int32_t> chosen;
  for (size_t home = 0; home < ranks; ++home) {
    for (int32_t row = 0; row < s.rows_per_rank; ++row) {
      routing.Draw(random, &chosen);
      engine::RankMask sent = 0;
      for (const int32_t expert : chosen) {
        const auto owner = static_cast<size_t>(
            engine::ChooseHolder(placement[static_cast<size_t>(expert)], static_cast<int32_t>(home), row));
        ++rows[owner];
        touched[owner][static_cast<size_t>(expert)] = 1;
        sent |= engine::RankMask{1} << owner;
      }
      uint64_t sent_nodes = 0;
      for (; sent != 0; sent &= sent - 1) {
        const auto owner = static_cast<size_t>(std::countr_zero(sent));
        sent_nodes |= uint64_t{1} << node_of(owner);
        if (owner == home) continue;
        std::vector<double>& link = node_of(owner) == node_of(home) ? nvlink : rdma;
        link[home] += bytes;
        link[owner] += bytes;
      }
      nodes += std::popcount(sent_nodes);
    }
  }
  LayerCost cost;
  const double total = std::accumulate(rows.begin(), rows.end(), 0.0);
  cost.imbalance = *std::max_element(rows.begin(), rows.end()) * static_cast<double>(ranks) / total;
  cost.nodes = nodes / static_cast<double>(ranks) / s.rows_per_rank;
  for (size_t r = 0; r < ranks; ++r) {
    const auto experts = std::count(touched[r].begin(), touched[r].end(), 1);
    cost.compute = std::max(cost.compute,
                            static_cast<double>(experts) * s.model.expert_bytes / links.memory_bytes_per_s);
    cost.exchange = std::max(cost.exchange, std::max(nvlink[r] / 2 / links.nvlink_bytes_per_s,
                                                     rdma[r] / 2 / links.rdma_bytes_per_s));
  }
  cost.exchange += s.num_ranks == 1                  ? 0
                   : s.num_ranks <= links.node_ranks ? links.nvlink_seconds
                                                     : links.rdma_seconds;
  return cost;
}

}  // namespace

ExpertModel LingMini() {
  ExpertModel model;
  model.name = "Ling-mini-2.0 fp8";
  model.num_layers = 19;
  model.hidden_size = 2048;
  model.expert_bytes = 3.0 * 2048 * 512;
  model.fixed_seconds = 0.8e-3;
  return model;
}

ExpertModel LingFlash() {
  ExpertModel model;
  model.name = "Ling-flash-2.0 fp8";
  model.num_layers = 31;
  model.hidden_size = 4096;
  model.expert_bytes = 3.0 * 4096 * 1024;
  model.fixed_seconds = 1.8e-3;
  return model;
}

ExpertResult SimulateExperts(const ExpertScenario& s, const Interconnect& links) {
  ExpertResult result;
  for (int32_t layer = 0; layer < s.model.num_layers; ++layer) {
    Random random(Mix64(s.seed) + static_cast<uint64_t>(layer));
    const LayerRouting routing(s.model, s.skew, random);
    std::vector<double> load(static_cast<size_t>(s.model.num_experts));
    std::vector<int32_t> chosen;
    if (s.balance) {
      for (int32_t i = 0; i < kObserved * s.rows_per_rank; ++i) {
        routing.Draw(random, &chosen);
        for (const int32_t expert : chosen) ++load[static_cast<size_t>(expert)];
      }
    }
    const LayerCost cost = RunLayer(s, links, routing, Place(s, links, load), random);
    result.imbalance += cost.imbalance / s.model.num_layers;
    result.nodes_per_token += cost.nodes / s.model.num_layers;
    result.compute_seconds += cost.compute;
    result.exchange_seconds += cost.exchange;
  }
  result.step_seconds = s.model.fixed_seconds + result.compute_seconds + result.exchange_seconds;
  result.tokens_per_s_per_gpu = s.rows_per_rank / result.step_seconds;
  return result;
}

}  // namespace millrace::sim
