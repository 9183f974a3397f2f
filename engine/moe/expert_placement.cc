#include "engine/moe/expert_placement.h"

#include <algorithm>
#include <bit>
#include <numeric>

#include "base/check.h"

namespace millrace::engine {
namespace {

struct Node {
  int32_t first_rank = 0;
  int32_t num_ranks = 0;
  std::vector<int32_t> experts;
};

// Experts by node: whole groups, the heaviest first to the node with least load that has room for one more.
std::vector<Node> AssignGroups(std::span<const double> load, const BalanceShape& shape) {
  const auto num_experts = static_cast<int32_t>(load.size());
  std::vector<Node> nodes(static_cast<size_t>(shape.num_nodes));
  for (int32_t n = 0; n < shape.num_nodes; ++n) {
    nodes[static_cast<size_t>(n)].num_ranks = shape.num_ranks / shape.num_nodes;
    nodes[static_cast<size_t>(n)].first_rank = n * (shape.num_ranks / shape.num_nodes);
  }
  const int32_t group_size = num_experts / shape.num_groups;
  std::vector<double> group_load(static_cast<size_t>(shape.num_groups));
  for (int32_t e = 0; e < num_experts; ++e) {
    group_load[static_cast<size_t>(e / group_size)] += load[static_cast<size_t>(e)];
  }
  std::vector<int32_t> order(group_load.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int32_t a, int32_t b) {
    return group_load[static_cast<size_t>(a)] > group_load[static_cast<size_t>(b)];
  });
  std::vector<double> node_load(nodes.size());
  const size_t room = static_cast<size_t>(group_size) * group_load.size() / nodes.size();
  for (const int32_t group : order) {
    size_t best = nodes.size();
    for (size_t n = 0; n < nodes.size(); ++n) {
      if (nodes[n].experts.size() == room) continue;
      if (best == nodes.size() || node_load[n] < node_load[best]) best = n;
    }
    node_load[best] += group_load[static_cast<size_t>(group)];
    for (int32_t i = 0; i < group_size; ++i) nodes[best].experts.push_back(group * group_size + i);
  }
  return nodes;
}

struct Copy {
  int32_t expert = 0;
  double load = 0;
};

// One copy of each expert, and as many more as there are slots, heaviest first.
std::vector<Copy> MakeCopies(std::span<const double> load, const Node& node, int32_t slots) {
  std::vector<int32_t> copies(node.experts.size(), 1);
  for (auto spare = slots - static_cast<int32_t>(node.experts.size()); spare > 0; --spare) {
    size_t best = copies.size();
    double most = -1;
    for (size_t i = 0; i < copies.size(); ++i) {
      if (copies[i] == node.num_ranks) continue;
      const double share = load[static_cast<size_t>(node.experts[i])] / copies[i];
      if (share > most) {
        most = share;
        best = i;
      }
    }
    if (best == copies.size()) break;  // every rank has every expert
    ++copies[best];
  }
  std::vector<Copy> all;
  for (size_t i = 0; i < copies.size(); ++i) {
    const double share = load[static_cast<size_t>(node.experts[i])] / copies[i];
    all.insert(all.end(), static_cast<size_t>(copies[i]), Copy{node.experts[i], share});
  }
  std::stable_sort(all.begin(), all.end(), [](const Copy& a, const Copy& b) { return a.load > b.load; });
  return all;
}

void Pack(std::span<const double> load, const Node& node, int32_t slots_per_rank, LayerPlacement* placement) {
  std::vector<double> rank_load(static_cast<size_t>(node.num_ranks));
  std::vector<int32_t> used(rank_load.size());
  for (const Copy& copy : MakeCopies(load, node, node.num_ranks * slots_per_rank)) {
    RankMask& holders = (*placement)[static_cast<size_t>(copy.expert)];
    size_t best = rank_load.size();
    for (size_t r = 0; r < rank_load.size(); ++r) {
      const int32_t rank = node.first_rank + static_cast<int32_t>(r);
      if (used[r] == slots_per_rank || (holders & RankBit(rank)) != 0) continue;
      if (best == rank_load.size() || rank_load[r] < rank_load[best]) best = r;
    }
    // Only a further copy can find no place: a first one fits wherever a slot is free.
    if (best == rank_load.size()) continue;
    holders |= RankBit(node.first_rank + static_cast<int32_t>(best));
    rank_load[best] += copy.load;
    ++used[best];
  }
}

// Experts that both ranks hold, of two placements.
int32_t Overlap(const LayerPlacement& a, int32_t rank_a, const LayerPlacement& b, int32_t rank_b) {
  int32_t count = 0;
  for (size_t e = 0; e < a.size(); ++e) {
    if ((a[e] & RankBit(rank_a)) != 0 && (b[e] & RankBit(rank_b)) != 0) ++count;
  }
  return count;
}

}  // namespace

LayerPlacement InitialPlacement(int32_t num_experts, int32_t num_ranks, int32_t redundant) {
  MR_CHECK(num_ranks >= 1 && num_ranks <= kRanksMax && num_experts >= num_ranks);
  LayerPlacement placement(static_cast<size_t>(num_experts));
  const auto first_of = [&](int32_t rank) {
    return static_cast<int32_t>(int64_t{rank} * num_experts / num_ranks);
  };
  for (int32_t rank = 0; rank < num_ranks; ++rank) {
    for (int32_t e = first_of(rank); e < first_of(rank + 1); ++e)
      placement[static_cast<size_t>(e)] |= RankBit(rank);
    const int32_t next = first_of((rank + 1) % num_ranks);
    for (int32_t i = 0; i < redundant; ++i) {
      placement[static_cast<size_t>((next + i) % num_experts)] |= RankBit(rank);
    }
  }
  return placement;
}

LayerPlacement BalancedPlacement(std::span<const double> load, const BalanceShape& shape) {
  const auto num_experts = static_cast<int32_t>(load.size());
  MR_CHECK(shape.num_ranks >= 1 && shape.num_ranks <= kRanksMax);
  MR_CHECK(int64_t{shape.num_ranks} * shape.slots_per_rank >= num_experts,
           "{} ranks of {} slots for {} experts", shape.num_ranks, shape.slots_per_rank, num_experts);
  LayerPlacement placement(load.size());
  BalanceShape used = shape;
  if (shape.num_nodes < 2 || shape.num_groups % shape.num_nodes != 0 || num_experts % shape.num_groups != 0 ||
      shape.num_ranks % shape.num_nodes != 0) {
    used.num_nodes = used.num_groups = 1;
  }
  for (const Node& node : AssignGroups(load, used)) Pack(load, node, shape.slots_per_rank, &placement);
  return placement;
}

LayerPlacement Renamed(const LayerPlacement& target, const LayerPlacement& current,
                       const BalanceShape& shape) {
  struct Match {
    int32_t overlap, from, to;
  };
  const int32_t per_node = shape.num_ranks / std::max(shape.num_nodes, 1);
  std::vector<Match> matches;
  for (int32_t from = 0; from < shape.num_ranks; ++from) {
    for (int32_t to = from / per_node * per_node; to < (from / per_node + 1) * per_node; ++to) {
      matches.push_back({Overlap(target, from, current, to), from, to});
    }
  }
  std::stable_sort(matches.begin(), matches.end(),
                   [](const Match& a, const Match& b) { return a.overlap > b.overlap; });
  std::vector<int32_t> name(static_cast<size_t>(shape.num_ranks), -1);
  RankMask taken = 0;
  for (const Match& match : matches) {
    if (name[static_cast<size_t>(match.from)] >= 0 || (taken & RankBit(match.to)) != 0) continue;
    name[static_cast<size_t>(match.from)] = match.to;
    taken |= RankBit(match.to);
  }
  LayerPlacement renamed(target.size());
  for (size_t e = 0; e < target.size(); ++e) {
    for (int32_t r = 0; r < shape.num_ranks; ++r) {
      if ((target[e] & RankBit(r)) != 0) renamed[e] |= RankBit(name[static_cast<size_t>(r)]);
    }
  }
  return renamed;
}

LayerPlacement CoveredPlacement(const LayerPlacement& current, std::span<const double> load, RankMask alive) {
  MR_CHECK(alive != 0 && load.size() == current.size());
  LayerPlacement placement(current.size());
  std::vector<int32_t> held(kRanksMax);
  std::vector<double> rank_load(kRanksMax);
  const auto add = [&](size_t e, int32_t rank, double share) {
    placement[e] |= RankBit(rank);
    ++held[static_cast<size_t>(rank)];
    rank_load[static_cast<size_t>(rank)] += share;
  };
  for (size_t e = 0; e < current.size(); ++e) {
    const RankMask holders = current[e] & alive;
    for (RankMask left = holders; left != 0; left &= left - 1) {
      add(e, std::countr_zero(left), load[e] / std::popcount(holders));
    }
  }
  for (size_t e = 0; e < current.size(); ++e) {
    if (placement[e] != 0) continue;
    int32_t best = -1;
    for (RankMask left = alive; left != 0; left &= left - 1) {
      const int32_t rank = std::countr_zero(left);
      const auto key = [&](int32_t r) {
        return std::pair(held[static_cast<size_t>(r)], rank_load[static_cast<size_t>(r)]);
      };
      if (best < 0 || key(rank) < key(best)) best = rank;
    }
    add(e, best, load[e]);
  }
  return placement;
}

double Imbalance(std::span<const double> load, const LayerPlacement& placement, RankMask alive) {
  std::vector<double> rank_load(kRanksMax);
  double total = 0;
  for (size_t e = 0; e < placement.size(); ++e) {
    const RankMask holders = placement[e] & alive;
    if (holders == 0) continue;
    total += load[e];
    for (RankMask left = holders; left != 0; left &= left - 1) {
      rank_load[static_cast<size_t>(std::countr_zero(left))] += load[e] / std::popcount(holders);
    }
  }
  if (total <= 0) return 1;
  return *std::max_element(rank_load.begin(), rank_load.end()) * std::popcount(alive) / total;
}

int32_t ChooseHolder(RankMask holders, int32_t home, int32_t row) {
  MR_CHECK(holders != 0);
  int32_t skip = (home + row) % std::popcount(holders);
  for (; skip > 0; --skip) holders &= holders - 1;
  return std::countr_zero(holders);
}

}  // namespace millrace::engine
