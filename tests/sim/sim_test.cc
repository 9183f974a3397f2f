// Random fault schedules over the production scheduler, health and ticket code; and planted bugs that the
// checkers must find.
#include <gtest/gtest.h>

#include "base/log.h"
#include "tests/sim/fleet.h"
#include "tests/sim/goodput.h"
#include "tests/sim/scenario.h"

namespace millrace::sim {
namespace {

void Quiet() { ASSERT_TRUE(ConfigureLog({.level = "error", .format = "text"}).ok()); }

TEST(Simulation, RandomSchedulesViolateNothing) {
  Quiet();
  const char* const wanted = std::getenv("MILLRACE_SIM_SCHEDULES");
  const uint64_t count = wanted != nullptr ? std::strtoull(wanted, nullptr, 10) : 1500;
  const char* const from = std::getenv("MILLRACE_SIM_FIRST_SEED");
  const uint64_t first = from != nullptr ? std::strtoull(from, nullptr, 10) : 1;
  Outcome sum;
  for (uint64_t seed = first; seed < first + count; ++seed) {
    const Outcome outcome = RunSchedule(seed);
    ASSERT_EQ(outcome.violation, "") << "seed " << seed;
    sum.steps += outcome.steps;
    sum.requests_ok += outcome.requests_ok;
    sum.reads_ok += outcome.reads_ok;
    sum.requests_failed += outcome.requests_failed;
    sum.reopened += outcome.reopened;
    sum.trips += outcome.trips;
    sum.slices_hedged += outcome.slices_hedged;
    sum.slices_superseded += outcome.slices_superseded;
  }
  std::printf(
      "%llu schedules: %llu events, %d requests done (%d of them reads), %d cancelled or lost with their "
      "peer, %llu peers opened again, %llu outages, "
      "%llu slices hedged, %llu copies superseded\n",
      static_cast<unsigned long long>(count), static_cast<unsigned long long>(sum.steps), sum.requests_ok,
      sum.reads_ok, sum.requests_failed, static_cast<unsigned long long>(sum.reopened),
      static_cast<unsigned long long>(sum.trips), static_cast<unsigned long long>(sum.slices_hedged),
      static_cast<unsigned long long>(sum.slices_superseded));
  // Otherwise the schedules show nothing.
  EXPECT_GT(sum.trips, count / 4);
  EXPECT_GT(sum.reads_ok, 0);
  EXPECT_GT(sum.reopened, count / 8);
  EXPECT_GT(sum.slices_hedged, 0U);
  EXPECT_GT(sum.slices_superseded, 0U);
}

TEST(Simulation, ASeedReplaysExactly) {
  Quiet();
  for (uint64_t seed = 1; seed <= 100; ++seed) {
    const Outcome a = RunSchedule(seed), b = RunSchedule(seed);
    EXPECT_EQ(a.steps, b.steps);
    EXPECT_EQ(a.requests_ok, b.requests_ok);
    EXPECT_EQ(a.slices_hedged, b.slices_hedged);
  }
}

// The picture's claim: README shows it, `sim_report` draws it.
TEST(Simulation, LateBindingIsBackWithin50MsAndEarlyBindersAreNot) {
  Quiet();
  const OutagePlan plan;
  for (const Policy policy : {Policy::kLateBinding, Policy::kRoundRobin, Policy::kStaticSplit}) {
    const auto goodput = GoodputThroughOutage(policy, plan);
    const Duration took = TimeToRecover(goodput, plan, 0.9);
    const auto before = static_cast<size_t>(plan.begins / plan.bin) - 1;
    std::printf("%-12s %.2f GB/s before; 90 %% of the rest back after %.0f ms\n", Name(policy),
                goodput[before] / 1e9, Seconds(took) * 1e3);
    EXPECT_GE(goodput[before], 0.95 * plan.bytes_per_second * plan.rails) << Name(policy);
    if (policy == Policy::kLateBinding) {
      EXPECT_LT(took, std::chrono::milliseconds(50));
      EXPECT_GE(goodput.back(), 0.95 * plan.bytes_per_second * plan.rails) << "back on the healed rail";
    } else {
      EXPECT_GT(took, std::chrono::milliseconds(300)) << Name(policy);
    }
  }
}

// A rail that slows down for a while under requests so short that the others would always be done with them
// sooner. Seconds after it is fast again: the part of all rails' rate that is used in the last tenth.
double PartInUseAfterSlowRail(uint64_t seed, Duration trial_period) {
  Random random(seed);
  OutagePlan plan;
  plan.rails = static_cast<int>(2 + random.Below(4));
  plan.bytes_per_second = 5e7 * static_cast<double>(1 + random.Below(6));
  plan.request_blocks = 1;
  plan.requests = 3 * static_cast<uint64_t>(plan.rails);
  plan.begins = std::chrono::milliseconds(100);
  plan.ends = plan.begins + std::chrono::milliseconds(50 + random.Below(250));
  plan.length = plan.ends + std::chrono::milliseconds(1300);
  plan.bin = std::chrono::milliseconds(100);
  plan.factor = 0.005 + 0.025 * random.Uniform();
  plan.trial_period = trial_period;
  const auto goodput = GoodputThroughOutage(Policy::kLateBinding, plan);
  EXPECT_GE(goodput[0], 0.9 * plan.bytes_per_second * plan.rails)
      << "seed " << seed << ": so short that they leave rails idle";
  return goodput.back() / (plan.bytes_per_second * plan.rails);
}

TEST(Simulation, ARailThatWasSlowCarriesItsShareAgain) {
  Quiet();
  int found = 0;
  for (uint64_t seed = 1; seed <= 20; ++seed) {
    EXPECT_GE(PartInUseAfterSlowRail(seed, transfer::Options().trial_period), 0.95) << "seed " << seed;
    // The bug that was there before there were trials; the bound above must show it.
    found += PartInUseAfterSlowRail(seed, Duration::max()) < 0.95;
  }
  std::printf("without trials %d of 20 rails carry nothing for ever\n", found);
  EXPECT_GT(found, 0);
}

TEST(Simulation, AFleetLosesOnlyWhatItsBrokenRailsCarried) {
  Quiet();
  FleetPlan plan;
  const char* const hosts = std::getenv("MILLRACE_SIM_HOSTS");
  plan.hosts = hosts != nullptr ? std::atoi(hosts) : 32;
  const FleetOutcome outcome = RunFleet(plan);
  ASSERT_EQ(outcome.violation, "");
  std::printf(
      "%d hosts x %d rails: %llu events, %llu requests, %llu outages, %llu slices hedged; least goodput of "
      "what worked "
      "%.3f before, %.3f from 50 ms into the outage, %.3f from 200 ms after it\n",
      plan.hosts, plan.rails, static_cast<unsigned long long>(outcome.steps),
      static_cast<unsigned long long>(outcome.requests), static_cast<unsigned long long>(outcome.trips),
      static_cast<unsigned long long>(outcome.hedged), outcome.before, outcome.during, outcome.after);
  EXPECT_GT(outcome.trips, 0U);
  EXPECT_GE(outcome.before, 0.9);
  EXPECT_GE(outcome.during, 0.9);
  EXPECT_GE(outcome.after, 0.9);
}

class PlantedBug : public testing::TestWithParam<Bug> {};

TEST_P(PlantedBug, IsFound) {
  Quiet();
  for (uint64_t seed = 1; seed <= 2000; ++seed) {
    const Outcome outcome = RunSchedule(seed, GetParam());
    if (outcome.violation.empty()) continue;
    std::printf("found with seed %llu: %s\n", static_cast<unsigned long long>(seed),
                outcome.violation.c_str());
    return;
  }
  FAIL() << "2,000 schedules did not show it";
}

INSTANTIATE_TEST_SUITE_P(All, PlantedBug, testing::ValuesIn(kBugs),
                         [](const auto& instance) { return std::string(Name(instance.param)); });

}  // namespace
}  // namespace millrace::sim
