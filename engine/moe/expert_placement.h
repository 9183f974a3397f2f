#pragma once
// Which rank of a group holds which expert of a layer, and how that follows from the load. Pure functions
// over one layer; the same code serves workers and the simulator.

#include <cstdint>
#include <span>
#include <vector>

namespace millrace::engine {

inline constexpr int32_t kRanksMax = 64;
using RankMask = uint64_t;  // bit r: rank r
inline RankMask RankBit(int32_t rank) { return RankMask{1} << rank; }

// Holders of each expert of one layer. Every expert has at least one, no expert has a rank twice.
using LayerPlacement = std::vector<RankMask>;  // [experts]

// Before anything is known of the load: consecutive experts, as evenly as can be, then `redundant` more per
// rank: the first ones of the rank that follows.
LayerPlacement InitialPlacement(int32_t num_experts, int32_t num_ranks, int32_t redundant);

struct BalanceShape {
  int32_t num_ranks = 1;
  int32_t slots_per_rank = 0;  // experts that a rank can hold; num_ranks * slots_per_rank >= experts
  // Nodes of equally many consecutive ranks. With more than one, and a multiple of them in groups, every
  // group of experts stays on one node, so that a token whose router keeps to few groups is sent to few
  // nodes.
  int32_t num_nodes = 1;
  int32_t num_groups = 1;
};

// Replicate and pack, greedily (as DeepSeek's EPLB does it: the expert with most load per copy gets the next
// copy until the slots are used up; then copies go, largest first, to the rank with least load that has room
// and not the same expert). Tokens of an expert are taken to spread evenly over its copies. load: [experts],
// not negative.
LayerPlacement BalancedPlacement(std::span<const double> load, const BalanceShape& shape);

// The same placement with the ranks renamed so that it shares as much with `current` as a greedy matching
// finds: what differs has to be loaded. Ranks stay on their node.
LayerPlacement Renamed(const LayerPlacement& target, const LayerPlacement& current,
                       const BalanceShape& shape);

// `current` without the ranks that are not alive; an expert that loses its last holder gets the living rank
// with the fewest experts, among equals the one with least load, whatever its slots.
LayerPlacement CoveredPlacement(const LayerPlacement& current, std::span<const double> load, RankMask alive);

// Load of the busiest living rank over the mean, 1 = even (and where there is no load).
double Imbalance(std::span<const double> load, const LayerPlacement& placement, RankMask alive);

// Which of the ranks in `holders` computes for this row: copies take turns.
int32_t ChooseHolder(RankMask holders, int32_t home, int32_t row);

}  // namespace millrace::engine
