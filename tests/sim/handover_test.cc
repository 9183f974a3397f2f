// The hand-over protocol under random faults, and under every fault at every message of one request; planted
// bugs that the checkers must find.
#include "tests/sim/handover.h"

#include <gtest/gtest.h>
#include <unistd.h>

#include <csignal>
#include <cstdlib>

#include "base/log.h"

namespace millrace::sim {
namespace {

uint64_t FromEnvironment(const char* name, uint64_t otherwise) {
  const char* const text = std::getenv(name);
  return text != nullptr ? std::strtoull(text, nullptr, 10) : otherwise;
}

// A CHECK of the production code that fails ends the process: its seed is told first.
volatile uint64_t running_seed = 0;
void TellSeed(int) {
  char text[64];
  const int length = std::snprintf(text, sizeof text, "in the simulation with seed %llu\n",
                                   static_cast<unsigned long long>(running_seed));
  if (write(STDERR_FILENO, text, static_cast<size_t>(length)) < 0) return;
}

class HandoverTest : public testing::Test {
 protected:
  void SetUp() override {
    ASSERT_TRUE(ConfigureLog({.level = "off", .format = "text"}).ok());
    std::signal(SIGABRT, TellSeed);
  }
};

HandoverOutcome Simulate(const HandoverPlan& plan) {
  running_seed = plan.seed;
  return RunHandover(plan);
}

struct Sum {
  HandoverOutcome all;
  uint64_t runs = 0;
  void Add(const HandoverOutcome& one) {
    ++runs;
    all.events += one.events;
    all.messages += one.messages;
    all.answered += one.answered;
    all.failed += one.failed;
    all.left += one.left;
    all.asked_again += one.asked_again;
    all.faults += one.faults;
    all.tokens += one.tokens;
    all.continued += one.continued;
    all.worst_gap = std::max(all.worst_gap, one.worst_gap);
  }
  void Print() const {
    std::printf(
        "%llu schedules: %llu events, %llu messages, %d faults; %d answers in full (%llu tokens), %d failed "
        "properly, %d clients left, %d asked again; %llu continuations; longest silence %.1f s\n",
        static_cast<unsigned long long>(runs), static_cast<unsigned long long>(all.events),
        static_cast<unsigned long long>(all.messages), all.faults, all.answered,
        static_cast<unsigned long long>(all.tokens), all.failed, all.left, all.asked_again,
        static_cast<unsigned long long>(all.continued), Seconds(all.worst_gap));
  }
};

TEST_F(HandoverTest, RandomFaultsViolateNothing) {
  const uint64_t count = FromEnvironment("MILLRACE_HANDOVER_SCHEDULES", 2000);
  const uint64_t first = FromEnvironment("MILLRACE_HANDOVER_FIRST_SEED", 1);
  Sum sum;
  for (uint64_t seed = first; seed < first + count; ++seed) {
    const HandoverOutcome outcome = Simulate({.seed = seed});
    ASSERT_EQ(outcome.violation, "") << "seed " << seed;
    sum.Add(outcome);
  }
  sum.Print();
  // Otherwise the schedules show nothing.
  EXPECT_GT(sum.all.continued, count / 10);
  EXPECT_GT(sum.all.asked_again, 0);
  EXPECT_GT(sum.all.left, 0);
  EXPECT_GT(sum.all.answered, 10 * sum.all.failed);
}

TEST_F(HandoverTest, EveryFaultAtEveryMessageCostsOneRequestNothingButTime) {
  const uint64_t messages = Simulate({.seed = 1, .only = HandoverStrike{.message = UINT64_MAX}}).messages;
  ASSERT_GT(messages, 20U);
  Sum sum;
  for (const HandoverFault fault : kHandoverFaults) {
    for (uint64_t message = 1; message <= messages; ++message) {
      for (const bool sender : {false, true}) {
        const HandoverOutcome outcome = Simulate(
            {.seed = 1, .only = HandoverStrike{.fault = fault, .message = message, .sender = sender}});
        ASSERT_EQ(outcome.violation, "")
            << Name(fault) << " at message " << message << " of its " << (sender ? "sender" : "receiver");
        EXPECT_EQ(outcome.answered, 1);
        sum.Add(outcome);
      }
    }
  }
  sum.Print();
}

// What lands wrong and is not noticed on the way is found by the seal's digest.
TEST_F(HandoverTest, DamagedBytesNeverReachAnAnswer) {
  Sum sum;
  for (uint64_t seed = 1; seed <= 200; ++seed) {
    const HandoverOutcome outcome = Simulate({.seed = seed, .damaged_bytes = true});
    ASSERT_EQ(outcome.violation, "") << "seed " << seed;
    sum.Add(outcome);
  }
  sum.Print();
}

TEST_F(HandoverTest, ASeedReplaysExactly) {
  for (uint64_t seed = 1; seed <= 50; ++seed) {
    const HandoverOutcome a = Simulate({.seed = seed}), b = Simulate({.seed = seed});
    EXPECT_EQ(a.events, b.events);
    EXPECT_EQ(a.messages, b.messages);
    EXPECT_EQ(a.tokens, b.tokens);
  }
}

class PlantedHandoverBug : public HandoverTest, public testing::WithParamInterface<HandoverBug> {};

TEST_P(PlantedHandoverBug, IsFound) {
  for (uint64_t seed = 1; seed <= 2000; ++seed) {
    const HandoverOutcome outcome = Simulate({.seed = seed, .bug = GetParam()});
    if (outcome.violation.empty()) continue;
    std::printf("found with seed %llu: %s\n", static_cast<unsigned long long>(seed),
                outcome.violation.c_str());
    return;
  }
  FAIL() << "2,000 schedules did not show it";
}

INSTANTIATE_TEST_SUITE_P(All, PlantedHandoverBug, testing::ValuesIn(kHandoverBugs),
                         [](const auto& instance) { return std::string(Name(instance.param)); });

}  // namespace
}  // namespace millrace::sim
