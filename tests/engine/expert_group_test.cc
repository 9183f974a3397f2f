// Expert groups, wherever ranks meet: the same bits as a single process, whoever holds an expert and however
// many ranks there are; experts that move while they are used; members that are lost.
#include <gtest/gtest.h>

#include <thread>

#include "base/log.h"
#include "tests/engine/expert_group_rig.h"

namespace millrace::engine {
namespace {

// The log's first use, in the library's own code, is on one thread: TSan does not see how the library guards
// it.
const bool log_is_made = [] {
  LogDebug("expert_group_test");
  return true;
}();

#ifdef MILLRACE_SANITIZED
constexpr int kSteps = 15;
#else
constexpr int kSteps = 60;
#endif

// Steps as far as `digests` go, joins the others' passes until all are done.
void RunRank(GroupRank& rank, int number, const GroupCase& c, const std::vector<uint64_t>& expected,
             std::atomic<int>& left) {
  GroupScript script(static_cast<uint64_t>(number) + 1, c.v2);
  for (size_t i = 0; i < expected.size(); ++i) {
    const StatusOr<uint64_t> digest = script.Next(*rank.backend);
    ASSERT_TRUE(digest.ok()) << digest.status();
    ASSERT_EQ(*digest, expected[i]) << "rank " << number << ", step " << i;
  }
  --left;
  while (left > 0) {
    if (!rank.backend->JoinWanted()) {
      std::this_thread::sleep_for(std::chrono::microseconds(100));
      continue;
    }
    const auto output = rank.backend->Forward({}, {});
    ASSERT_TRUE(output.ok()) << output.status();
  }
}

class ExpertGroupTest : public ::testing::TestWithParam<std::tuple<int, bool, int>> {};

TEST_P(ExpertGroupTest, RanksComputeWhatOneProcessDoes) {
  const auto [ranks, v2, format] = GetParam();
  GroupCase c;
  c.v2 = v2;
  if (format > 0) c.precision = Precision::kBfloat16;
  if (format == 2) c.quantization = Quantization::kInt8;
  if (format == 3) c.quantization = Quantization::kInt4;
  const RandomTensors source(11);
  const auto place = MakeGroupPlace(ranks);
  const auto expected = Expected(c, source, ranks, kSteps);
  std::atomic<int> left = ranks;
  std::vector<std::jthread> threads;
  for (int r = 0; r < ranks; ++r) {
    threads.emplace_back([&, r] {
      auto rank = StartRank(c, source, *place, r, ranks, /*redundant=*/ranks > 2 ? 1 : 0);
      ASSERT_TRUE(rank.ok()) << rank.status();
      // Rank 1 has nothing to do but to join.
      std::vector<uint64_t> mine = expected[static_cast<size_t>(r)];
      if (r == 1 && ranks == 4) mine.clear();
      RunRank(*rank, r, c, mine, left);
    });
  }
}

std::string CaseName(const ::testing::TestParamInfo<std::tuple<int, bool, int>>& info) {
  const char* const formats[] = {"Float32", "Bf16", "Int8", "Int4"};
  return fmt::format("{}Ranks{}{}", std::get<0>(info.param), std::get<1>(info.param) ? "V2" : "V1",
                     formats[std::get<2>(info.param)]);
}

INSTANTIATE_TEST_SUITE_P(All, ExpertGroupTest,
                         ::testing::Combine(::testing::Values(1, 2, 4), ::testing::Bool(),
                                            ::testing::Values(0, 1, 2, 3)),
                         CaseName);

// Experts wander while ranks compute: the leader evens out a load that is as random as the router, again and
// again.
TEST(ExpertGroup, ExpertsMoveWhileServing) {
  const GroupCase c;
  const RandomTensors source(11);
  constexpr int kRanks = 3;
  const auto place = MakeGroupPlace(kRanks);
  const auto expected = Expected(c, source, kRanks, 4 * kSteps);
  std::atomic<int> left = kRanks;
  std::atomic<int> moved = 0;
  std::vector<std::jthread> threads;
  for (int r = 0; r < kRanks; ++r) {
    threads.emplace_back([&, r] {
      CpuGroupOptions options;
      options.rebalance_every = std::chrono::seconds(1);  // enough decisions under a sanitizer too
      options.slots_per_layer = 8;
      auto rank = StartRank(c, source, *place, r, kRanks, /*redundant=*/1, options);
      ASSERT_TRUE(rank.ok()) << rank.status();
      const std::vector<LayerPlacement> before = rank->group->HeldNow();
      const uint32_t epoch = rank->group->epoch();
      RunRank(*rank, r, c, expected[static_cast<size_t>(r)], left);
      // Until all have seen it.
      GroupScript more(static_cast<uint64_t>(r) + 1, c.v2);
      const TimePoint until = Clock::System().Now() + std::chrono::seconds(120);
      bool seen = false;
      while (moved < kRanks && Clock::System().Now() < until) {
        if (!seen && rank->group->HeldNow() != before) {
          seen = true;
          EXPECT_EQ(rank->group->epoch(), epoch) << "a rank was lost";
          ++moved;
        }
        ASSERT_TRUE(more.Next(*rank->backend).ok());
        std::this_thread::sleep_for(std::chrono::milliseconds(1));  // for the mover
      }
      for (const LayerPlacement& layer : rank->group->HeldNow()) {
        for (const RankMask holders : layer) EXPECT_NE(holders, 0U);
      }
    });
  }
  threads.clear();
  EXPECT_EQ(moved, kRanks);
}

// A rank goes in the middle of the others' steps, and comes back: they go on, and nothing that they compute
// changes.
TEST(ExpertGroup, RanksLeaveAndComeBack) {
  const GroupCase c;
  const RandomTensors source(11);
  constexpr int kRanks = 3;
  const auto place = MakeGroupPlace(kRanks);
  const auto expected = Expected(c, source, kRanks, 4 * kSteps);
  std::atomic<int> left = kRanks;
  std::vector<std::jthread> threads;
  for (int r = 0; r < kRanks; ++r) {
    threads.emplace_back([&, r] {
      auto rank = StartRank(c, source, *place, r, kRanks, 0);
      ASSERT_TRUE(rank.ok()) << rank.status();
      if (r == 1) {
        for (int round = 0; round < 3; ++round) {
          GroupScript script(2, c.v2);
          for (int i = 0; i < kSteps / 3; ++i) {
            const auto digest = script.Next(*rank->backend);
            ASSERT_TRUE(digest.ok()) << digest.status();
            ASSERT_EQ(*digest, expected[1][static_cast<size_t>(i)]);
          }
          rank->backend.reset();
          rank->group.reset();
          rank = StartRank(c, source, *place, r, kRanks, 0);
          ASSERT_TRUE(rank.ok()) << rank.status();
        }
      }
      RunRank(*rank, r, c, expected[static_cast<size_t>(r)], left);
    });
  }
}

}  // namespace
}  // namespace millrace::engine
