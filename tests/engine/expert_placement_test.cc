// Placement of experts: what must hold of every placement, over random loads.
#include "engine/moe/expert_placement.h"

#include <gtest/gtest.h>

#include <bit>
#include <cmath>

#include "base/random.h"

namespace millrace::engine {
namespace {

RankMask All(int32_t ranks) { return ranks == kRanksMax ? ~RankMask{0} : (RankMask{1} << ranks) - 1; }

// Heavy-tailed: a few experts get most.
std::vector<double> SkewedLoad(int32_t experts, Random& random) {
  std::vector<double> load;
  for (int32_t e = 0; e < experts; ++e) load.push_back(std::pow(random.Uniform(), -0.7) * 100);
  return load;
}

std::vector<int32_t> HeldBy(const LayerPlacement& placement, int32_t ranks) {
  std::vector<int32_t> held(static_cast<size_t>(ranks));
  for (const RankMask holders : placement) {
    for (int32_t r = 0; r < ranks; ++r)
      held[static_cast<size_t>(r)] += static_cast<int32_t>(holders >> r & 1);
  }
  return held;
}

TEST(ExpertPlacement, InitialIsEvenAndComplete) {
  for (const int32_t ranks : {1, 2, 3, 4, 7, 8, 32}) {
    for (const int32_t redundant : {0, 1, 5}) {
      const LayerPlacement placement = InitialPlacement(64, ranks, redundant);
      for (const RankMask holders : placement) EXPECT_NE(holders & All(ranks), 0U);
      for (const int32_t held : HeldBy(placement, ranks)) {
        EXPECT_GE(held, 64 / ranks);
        EXPECT_LE(held, 64 / ranks + 1 + redundant);
      }
    }
  }
}

TEST(ExpertPlacement, BalancedHoldsEachExpertWithinItsSlotsAndIsMoreEven) {
  Random random(1);
  double before = 0;
  double after = 0;
  for (int trial = 0; trial < 200; ++trial) {
    const auto ranks = static_cast<int32_t>(1U << random.Below(6));
    BalanceShape shape;
    shape.num_ranks = ranks;
    shape.slots_per_rank = 256 / ranks + static_cast<int32_t>(random.Below(5));
    const std::vector<double> load = SkewedLoad(256, random);
    const LayerPlacement placement = BalancedPlacement(load, shape);
    for (const RankMask holders : placement) {
      EXPECT_NE(holders, 0U);
      EXPECT_EQ(holders & ~All(ranks), 0U);
    }
    for (const int32_t held : HeldBy(placement, ranks)) EXPECT_LE(held, shape.slots_per_rank);
    before += Imbalance(load, InitialPlacement(256, ranks, 0), All(ranks));
    after += Imbalance(load, placement, All(ranks));
  }
  EXPECT_LT(after, 0.8 * before);
}

// A hot expert can be no more even than its copies make it: against the lower bound of any placement.
TEST(ExpertPlacement, BalancedIsNearTheBestThatThereCanBe) {
  Random random(2);
  for (int trial = 0; trial < 100; ++trial) {
    BalanceShape shape;
    shape.num_ranks = 8;
    shape.slots_per_rank = 36;  // 32 spare
    const std::vector<double> load = SkewedLoad(256, random);
    EXPECT_LT(Imbalance(load, BalancedPlacement(load, shape), All(8)), 1.15);
  }
}

TEST(ExpertPlacement, GroupsStayOnTheirNode) {
  Random random(3);
  for (int trial = 0; trial < 50; ++trial) {
    BalanceShape shape;
    shape.num_ranks = 16;
    shape.slots_per_rank = 18;
    shape.num_nodes = 4;
    shape.num_groups = 8;
    const std::vector<double> load = SkewedLoad(256, random);
    const LayerPlacement placement = BalancedPlacement(load, shape);
    for (size_t group = 0; group < 8; ++group) {
      RankMask nodes = 0;
      for (size_t e = group * 32; e < group * 32 + 32; ++e) {
        EXPECT_NE(placement[e], 0U);
        for (int32_t r = 0; r < 16; ++r) {
          if ((placement[e] >> r & 1) != 0) nodes |= RankMask{1} << (r / 4);
        }
      }
      EXPECT_EQ(std::popcount(nodes), 1) << "group " << group;
    }
    for (const int32_t held : HeldBy(placement, 16)) EXPECT_LE(held, 18);
  }
}

TEST(ExpertPlacement, RenamingMovesLess) {
  Random random(4);
  BalanceShape shape;
  shape.num_ranks = 8;
  shape.slots_per_rank = 34;
  const auto moves = [](const LayerPlacement& from, const LayerPlacement& to) {
    int count = 0;
    for (size_t e = 0; e < from.size(); ++e) count += std::popcount(to[e] & ~from[e]);
    return count;
  };
  const std::vector<double> load = SkewedLoad(256, random);
  const LayerPlacement current = BalancedPlacement(load, shape);
  EXPECT_EQ(moves(current, Renamed(current, current, shape)), 0);
  // The same with ranks 0 and 5, 2 and 3 in each other's place is found out.
  LayerPlacement swapped = current;
  const int32_t names[] = {5, 1, 3, 2, 4, 0, 6, 7};
  for (size_t e = 0; e < current.size(); ++e) {
    swapped[e] = 0;
    for (int32_t r = 0; r < 8; ++r) {
      if ((current[e] >> r & 1) != 0) swapped[e] |= RankMask{1} << names[r];
    }
  }
  EXPECT_GT(moves(current, swapped), 0);
  EXPECT_EQ(moves(current, Renamed(swapped, current, shape)), 0);
}

TEST(ExpertPlacement, LossOfRanksIsCovered) {
  Random random(5);
  for (int trial = 0; trial < 200; ++trial) {
    const int32_t ranks = 2 + static_cast<int32_t>(random.Below(7));
    const LayerPlacement current = InitialPlacement(32, ranks, static_cast<int32_t>(random.Below(3)));
    RankMask alive = static_cast<RankMask>(random.Next()) & All(ranks);
    if (alive == 0) alive = 1;
    const std::vector<double> load = SkewedLoad(32, random);
    const LayerPlacement covered = CoveredPlacement(current, load, alive);
    for (size_t e = 0; e < covered.size(); ++e) {
      EXPECT_NE(covered[e], 0U);
      EXPECT_EQ(covered[e] & ~alive, 0U);
      if ((current[e] & alive) != 0) {
        EXPECT_EQ(covered[e], current[e] & alive);
      }
    }
    std::vector<int32_t> held;
    const std::vector<int32_t> all_held = HeldBy(covered, ranks);
    for (int32_t r = 0; r < ranks; ++r) {
      if ((alive >> r & 1) != 0) held.push_back(all_held[static_cast<size_t>(r)]);
    }
    EXPECT_LE(*std::max_element(held.begin(), held.end()) - *std::min_element(held.begin(), held.end()), 3);
  }
}

TEST(ExpertPlacement, CopiesTakeTurns) {
  const RankMask holders = 0b101010;
  std::vector<int> count(6);
  for (int32_t row = 0; row < 300; ++row) ++count[static_cast<size_t>(ChooseHolder(holders, 4, row))];
  EXPECT_EQ(count, (std::vector<int>{0, 100, 0, 100, 0, 100}));
}

}  // namespace
}  // namespace millrace::engine
