#include "engine/scheduler/scheduler.h"

#include <gtest/gtest.h>

#include <map>

#include "base/random.h"

namespace millrace::engine {
namespace {

ScheduleEntry Decoding(int32_t slot, int64_t arrival = 0) { return {slot, 1, true, 0, arrival}; }
ScheduleEntry Prefill(int32_t slot, int32_t tokens, int32_t priority = 0, int64_t arrival = 0) {
  return {slot, tokens, false, priority, arrival};
}

std::vector<std::pair<int32_t, int32_t>> Picked(const std::vector<ScheduleEntry>& entries,
                                                ScheduleLimits limits) {
  std::vector<std::pair<int32_t, int32_t>> picked;
  for (const ScheduledRun& run : Schedule(entries, limits)) picked.emplace_back(run.slot, run.num_tokens);
  return picked;
}
using Runs = std::vector<std::pair<int32_t, int32_t>>;

TEST(Schedule, PutsDecodingFirstAndFillsUpWithPrefill) {
  EXPECT_EQ(Picked({Prefill(0, 1000), Decoding(1), Decoding(2)}, {512, 64}),
            (Runs{{1, 1}, {2, 1}, {0, 448}}));
  EXPECT_EQ(Picked({}, {512, 64}), Runs{});
}

TEST(Schedule, OrdersPrefillByPriorityThenArrival) {
  EXPECT_EQ(Picked({Prefill(0, 30, 0, 1), Prefill(1, 30, 0, 0), Prefill(2, 30, 5, 2)}, {512, 64}),
            (Runs{{2, 30}, {1, 30}, {0, 30}}));
}

TEST(Schedule, CutsChunksAtPageBordersOnly) {
  EXPECT_EQ(Picked({Prefill(0, 200)}, {130, 4}), (Runs{{0, 128}}));
  EXPECT_EQ(Picked({Prefill(0, 130)}, {130, 4}), (Runs{{0, 130}}));
  // What is left after a chunk goes to a prompt that it can finish.
  EXPECT_EQ(Picked({Prefill(0, 200, 0, 0), Prefill(1, 70, 0, 1), Prefill(2, 2, 0, 2)}, {130, 4}),
            (Runs{{0, 128}, {2, 2}}));
}

TEST(Schedule, LeavesPrefillItsShare) {
  std::vector<ScheduleEntry> entries;
  for (int32_t i = 0; i < 600; ++i) entries.push_back(Decoding(i, i));
  EXPECT_EQ(Schedule(entries, {512, 1000}).size(), 512u);
  entries.push_back(Prefill(600, 300));
  const std::vector<ScheduledRun> runs = Schedule(entries, {512, 1000});
  ASSERT_EQ(runs.size(), 385u);
  EXPECT_EQ(runs.back().slot, 600);
  EXPECT_EQ(runs.back().num_tokens, 128);
  // And one run, however few there are.
  EXPECT_EQ(Picked({Decoding(0, 0), Decoding(1, 1), Prefill(2, 5)}, {128, 2}), (Runs{{0, 1}, {2, 5}}));
}

TEST(Schedule, KeepsItsLimitsOnRandomInput) {
  for (uint64_t seed = 0; seed < 500; ++seed) {
    Random random(seed * 1000);
    const ScheduleLimits limits{static_cast<int32_t>(65 + random.Below(1000)),
                                static_cast<int32_t>(1 + random.Below(64))};
    std::vector<ScheduleEntry> entries;
    std::map<int32_t, ScheduleEntry> by_slot;
    for (int32_t slot = 0; slot < static_cast<int32_t>(random.Below(80)); ++slot) {
      ScheduleEntry entry =
          random.Below(2) == 0 ? Decoding(slot) : Prefill(slot, 1 + static_cast<int32_t>(random.Below(2000)));
      entry.priority = static_cast<int32_t>(random.Below(3));
      entry.arrival = static_cast<int64_t>(random.Below(1000));
      entries.push_back(entry);
      by_slot[slot] = entry;
    }
    const std::vector<ScheduledRun> runs = Schedule(entries, limits);
    EXPECT_LE(static_cast<int32_t>(runs.size()), limits.runs_max) << "seed " << seed;
    EXPECT_EQ(runs.empty(), entries.empty()) << "seed " << seed;
    int32_t tokens = 0;
    for (const ScheduledRun& run : runs) {
      ASSERT_EQ(by_slot.count(run.slot), 1u) << "seed " << seed;
      const ScheduleEntry entry = by_slot[run.slot];
      by_slot.erase(run.slot);
      tokens += run.num_tokens;
      EXPECT_GT(run.num_tokens, 0) << "seed " << seed;
      EXPECT_LE(run.num_tokens, entry.tokens_pending) << "seed " << seed;
      EXPECT_TRUE(run.num_tokens == entry.tokens_pending || run.num_tokens % kPageTokens == 0)
          << "seed " << seed;
    }
    EXPECT_LE(tokens, limits.tokens_max) << "seed " << seed;
  }
}

}  // namespace
}  // namespace millrace::engine
