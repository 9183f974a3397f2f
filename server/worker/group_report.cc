#include "server/worker/group_report.h"

#include <algorithm>
#include <bit>

namespace millrace::server {
namespace {

constexpr Duration kCountEvery = std::chrono::seconds(1);

}  // namespace

const rpc::ExpertGroupState& GroupReporter::Look(TimePoint now) {
  state_.set_rank(static_cast<uint32_t>(group_.rank()));
  state_.set_ranks(static_cast<uint32_t>(group_.shape().num_ranks));
  state_.set_epoch(group_.epoch());
  state_.set_alive(static_cast<uint32_t>(group_.alive()));
  const std::vector<uint32_t> ports = group_.Announced();
  state_.mutable_ports()->Assign(ports.begin(), ports.end());
  if (now - counted_ >= kCountEvery) {
    counted_ = now;
    Count();
  }
  return state_;
}

// Load since the last look, by expert and by rank; as before when nobody has computed meanwhile.
void GroupReporter::Count() {
  const engine::GroupShape& shape = group_.shape();
  const engine::RankMask alive = group_.alive();
  const std::vector<engine::LayerPlacement> held = group_.HeldNow();
  const std::vector<uint64_t> loads = group_.Loads();
  const auto num_experts = static_cast<size_t>(shape.num_experts);
  std::vector<double> by_expert(num_experts);
  std::vector<double> by_rank(static_cast<size_t>(shape.num_ranks));
  double total = 0;
  double imbalance = 0;
  uint32_t mine = 0;
  for (size_t l = 0; l < held.size(); ++l) {
    std::vector<double> load(num_experts);
    for (size_t e = 0; e < num_experts; ++e) {
      const size_t cell = l * num_experts + e;
      if ((held[l][e] >> group_.rank() & 1) != 0) ++mine;
      if (cell >= before_.size() || loads[cell] < before_[cell]) continue;  // a rank has left
      load[e] = static_cast<double>(loads[cell] - before_[cell]);
      total += load[e];
      by_expert[e] += load[e];
      for (engine::RankMask left = held[l][e]; left != 0; left &= left - 1) {
        by_rank[static_cast<size_t>(std::countr_zero(left))] += load[e] / std::popcount(held[l][e]);
      }
    }
    imbalance += engine::Imbalance(load, held[l], alive) / static_cast<double>(held.size());
  }
  before_ = loads;
  state_.set_experts_held(mine);
  if (total > 0) {
    state_.clear_expert_load();
    state_.clear_rank_load();
    for (const double load : by_expert) state_.add_expert_load(static_cast<float>(load / total));
    for (const double load : by_rank) state_.add_rank_load(static_cast<float>(load / total));
    state_.set_imbalance(imbalance);
  }
  if (metrics_ == nullptr) return;
  metrics_->Gauge("millrace_expert_group_ranks", "Ranks that the expert group is made of.")
      .Set(shape.num_ranks);
  metrics_->Gauge("millrace_expert_group_ranks_alive", "Of these, ranks that are members now.")
      .Set(std::popcount(alive));
  metrics_->Gauge("millrace_expert_group_epoch", "Changes of the group's membership.").Set(group_.epoch());
  metrics_->Gauge("millrace_expert_group_experts_held", "Routed experts of all layers that this rank holds.")
      .Set(mine);
  if (total <= 0) return;
  metrics_
      ->Gauge(
          "millrace_expert_group_imbalance",
          "Load of the busiest rank over the mean, averaged over the layers, in the last second with load.")
      .Set(imbalance);
  for (size_t r = 0; r < by_rank.size(); ++r) {
    metrics_
        ->Gauge("millrace_expert_group_rank_load", "Share of the group's routed tokens that a rank computes.",
                {{"rank", std::to_string(r)}})
        .Set(by_rank[r] / total);
  }
  if (!group_.leads()) return;  // once per group: it is the same on all
  for (size_t e = 0; e < num_experts; ++e) {
    metrics_
        ->Counter("millrace_expert_routed_tokens_total",
                  "Routing decisions for an expert, all layers and ranks.", {{"expert", std::to_string(e)}})
        .Increment(by_expert[e]);
  }
}

}  // namespace millrace::server
