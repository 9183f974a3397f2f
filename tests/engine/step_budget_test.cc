#include "engine/scheduler/step_budget.h"

#include <gtest/gtest.h>

#include "engine/core/engine_core.h"
#include "tests/engine/slow_backend.h"
#include "tests/engine/test_engine.h"

namespace millrace::engine {
namespace {

using std::chrono::milliseconds;

TEST(StepTokens, TakesWhatTheTimeAllowsAndNeverLessThanAPageBesideTheAnswers) {
  EXPECT_EQ(StepTokens(512, 0, milliseconds(100), 0.001), 512) << "nobody waits";
  EXPECT_EQ(StepTokens(512, 4, milliseconds(0), 0.001), 512) << "no target";
  EXPECT_EQ(StepTokens(512, 4, milliseconds(100), 0), 512) << "not measured";
  EXPECT_EQ(StepTokens(512, 4, milliseconds(100), 0.001), 100);
  EXPECT_EQ(StepTokens(512, 4, milliseconds(100), 0.01), 68) << "a page and four answers";
  EXPECT_EQ(StepTokens(512, 4, milliseconds(1000), 0.0001), 512);
  EXPECT_EQ(StepTokens(512, 300, milliseconds(1), 0.01), 400) << "all answers, beside a quarter for prompts";
}

// The longest time between two tokens of a running answer while long prompts keep coming.
Duration LongestGap(Duration target) {
  FakeClock clock;
  SlowBackend backend(200, &clock, milliseconds(1));
  EngineOptions options = Options();
  options.batch_tokens_max = 1024;
  options.clock = &clock;
  options.token_gap_target = target;
  EngineCore core(options, &backend);
  const auto submit = [&](RequestId id, int32_t prompt_tokens, int32_t max_tokens) {
    auto recording = std::make_shared<Recording>();
    core.Submit(SequenceRole::kGenerate, Request(id, prompt_tokens, max_tokens),
                std::make_unique<RecordingSink>(recording), nullptr);
    return recording;
  };
  const auto warm = submit(1, 300, 1);  // so that the cost is known
  while (core.Prepare()) EXPECT_EQ(core.Run(), OkStatus());
  const auto answer = submit(2, 10, 60);
  Duration longest(0);
  TimePoint last;
  size_t seen = 0;
  for (RequestId id = 3; core.Prepare();) {
    EXPECT_EQ(core.Run(), OkStatus());
    if (answer->ended()) break;
    if (id < 12) submit(id, 900, 1), ++id;
    if (answer->tokens().size() == seen) continue;
    if (seen > 0) longest = std::max(longest, clock.Now() - last);
    seen = answer->tokens().size();
    last = clock.Now();
  }
  EXPECT_TRUE(answer->ended());
  core.EndAll(Cancelled("over"));
  return longest;
}

TEST(StepTokens, BoundsTheTimeBetweenTwoTokens) {
  EXPECT_GT(LongestGap(milliseconds(0)), milliseconds(700)) << "whole batches";
  EXPECT_LE(LongestGap(milliseconds(200)), milliseconds(200));
  EXPECT_LE(LongestGap(milliseconds(20)), milliseconds(kPageTokens + 1)) << "a page is the least";
}

}  // namespace
}  // namespace millrace::engine
