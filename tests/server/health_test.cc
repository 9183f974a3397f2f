#include <gtest/gtest.h>

#include "server/router/breaker.h"
#include "server/router/retry_budget.h"
#include "server/router/speed.h"
#include "server/router/worker_health.h"

namespace millrace::server {
namespace {

using std::chrono::milliseconds;
using std::chrono::seconds;

TimePoint At(double s) {
  return TimePoint(std::chrono::duration_cast<Duration>(std::chrono::duration<double>(s)));
}

// One step of a breaker's life at a time, what is said then, and how it stands afterwards.
TEST(Breaker, FollowsItsTable) {
  struct Step {
    double at;
    char said;  // b begin, s success, f failure, n neither, - nothing
    BreakerState state;
    bool allows;
  };
  constexpr auto kClosed = BreakerState::kClosed;
  constexpr auto kOpen = BreakerState::kOpen;
  constexpr auto kProbation = BreakerState::kProbation;
  const std::vector<Step> steps = {
      {1.0, 'f', kClosed, true},      // one failure is no reason
      {1.1, 'f', kClosed, true},      //
      {1.2, 's', kClosed, true},      // and a success forgives
      {1.3, 'f', kClosed, true},      //
      {1.4, 'f', kClosed, true},      //
      {1.5, 'f', kOpen, false},       // three in a row: open for 1 s
      {1.6, 'f', kOpen, false},       // what was under way says nothing new
      {2.4, '-', kOpen, false},       //
      {2.6, '-', kProbation, true},   //
      {2.6, 'b', kProbation, false},  // one trial at a time
      {2.7, 'n', kProbation, true},   // it said nothing
      {2.8, 'b', kProbation, false},  //
      {2.9, 'f', kOpen, false},       // the trial failed: 2 s
      {4.8, '-', kOpen, false},       //
      {5.0, 'b', kProbation, false},  //
      {5.1, 's', kProbation, true},   // three trials
      {5.2, 'b', kProbation, false},  //
      {5.3, 's', kProbation, true},   //
      {5.4, 'b', kProbation, false},  //
      {5.5, 's', kClosed, true},      //
      {5.6, 'f', kClosed, true},      // as if nothing had been
      {5.6, 'f', kClosed, true},      //
      {5.6, 'f', kOpen, false},       //
      {6.7, '-', kProbation, true},   // and 1 s again
  };
  Breaker breaker({.failures_max = 3, .open_min = seconds(1), .open_max = seconds(15), .trials = 3});
  for (size_t i = 0; i < steps.size(); ++i) {
    const Step& step = steps[i];
    const TimePoint now = At(step.at);
    if (step.said == 'b') breaker.OnBegin(now);
    if (step.said == 's') breaker.OnSuccess();
    if (step.said == 'f') breaker.OnFailure(now, 0);
    if (step.said == 'n') breaker.OnNeither();
    EXPECT_EQ(breaker.state(now), step.state) << "step " << i;
    EXPECT_EQ(breaker.Allows(now), step.allows) << "step " << i;
  }
}

TEST(Breaker, StaysOpenNoLongerThanItsBoundAndCallersAreSpread) {
  for (const double chance : {0.0, 0.5, 0.999}) {
    Breaker breaker({.failures_max = 1, .open_min = seconds(1), .open_max = seconds(4), .trials = 1});
    double at = 1;
    for (const double open : {1, 2, 4, 4}) {
      breaker.OnBegin(At(at));
      breaker.OnFailure(At(at), chance);
      const double until = at + open * (1 + chance / 2);
      EXPECT_EQ(breaker.state(At(until - 0.01)), BreakerState::kOpen) << chance << " " << open;
      EXPECT_EQ(breaker.state(At(until + 0.01)), BreakerState::kProbation) << chance << " " << open;
      at = until + 0.02;
    }
  }
}

TEST(WorkerHealth, AWorkerIsAvoidedUntilATrialSucceedsOrItsProcessIsAnother) {
  FakeClock clock;
  WorkerHealth health({.failures_max = 2, .open_min = seconds(1), .open_max = seconds(1), .trials = 1},
                      &clock);
  std::vector<WorkerSnapshot> workers(2);
  workers[0].address = "a";
  workers[1].address = "b";
  workers[0].epoch = workers[1].epoch = 1;
  const auto avoided = [&] {
    for (WorkerSnapshot& worker : workers) worker.avoid = false;
    health.Apply(&workers);
    return std::vector<bool>{workers[0].avoid, workers[1].avoid};
  };
  const auto fail = [&](const char* address) {
    health.Begin(address);
    health.Failed(address);
  };
  fail("a");
  EXPECT_EQ(avoided(), (std::vector<bool>{false, false}));
  fail("a");
  EXPECT_EQ(avoided(), (std::vector<bool>{true, false}));
  EXPECT_FALSE(health.Allows("a"));
  EXPECT_EQ(health.Avoided(), std::vector<std::string>{"a"});
  clock.Advance(seconds(2));  // probation
  EXPECT_TRUE(health.Allows("a"));
  health.Begin("a");
  EXPECT_FALSE(health.Allows("a")) << "one trial at a time";
  health.Neither("a");
  health.Begin("a");
  health.Succeeded("a");
  EXPECT_EQ(avoided(), (std::vector<bool>{false, false}));
  EXPECT_TRUE(health.Avoided().empty());
  fail("b");
  fail("b");
  EXPECT_EQ(avoided(), (std::vector<bool>{false, true}));
  workers[1].epoch = 2;
  EXPECT_EQ(avoided(), (std::vector<bool>{false, false})) << "another process";
  fail("b");
  EXPECT_EQ(avoided(), (std::vector<bool>{false, false})) << "with a clean record";
}

TEST(Medians, AreThoseOfTheOthers) {
  const Medians medians({3, 0, 1, 2, 0, 5});
  EXPECT_EQ(medians.Without(1), 3);
  EXPECT_EQ(medians.Without(2), 3);
  EXPECT_EQ(medians.Without(3), 2);
  EXPECT_EQ(medians.Without(5), 2);
  EXPECT_EQ(medians.Without(0), 2) << "of four, the lower of the middle two";
  EXPECT_EQ(Medians({7}).Without(7), 0);
  EXPECT_EQ(Medians({7, 7}).Without(7), 7);
  EXPECT_EQ(Medians({}).Without(0), 0);
}

TEST(RetryBudget, LetsABurstPassAndSpreadsTheRest) {
  RetryBudget budget({.per_second = 10, .per_request = 0.5, .burst_max = 3});
  const TimePoint now = At(5);
  for (int i = 0; i < 3; ++i) EXPECT_EQ(budget.Take(now), Duration(0)) << i;
  for (int i = 1; i <= 4; ++i) EXPECT_EQ(budget.Take(now), milliseconds(100 * i)) << i;
  EXPECT_EQ(budget.Take(now + milliseconds(200)), milliseconds(300)) << "two have had their turn";
  for (int i = 0; i < 20; ++i) budget.OnRequest();
  for (int i = 0; i < 3; ++i)
    EXPECT_EQ(budget.Take(now + milliseconds(200)), Duration(0)) << "no more than the burst";
  EXPECT_GT(budget.Take(now + milliseconds(200)), Duration(0));
}

}  // namespace
}  // namespace millrace::server
