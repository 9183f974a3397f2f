#include "base/status.h"

#include <gtest/gtest.h>

#include <memory>

#include "base/check.h"
#include "base/clock.h"
#include "base/cpu.h"
#include "base/thread.h"

namespace millrace {
namespace {

StatusOr<std::unique_ptr<int>> Half(int value) {
  if (value % 2 != 0) return InvalidArgument("{} is odd", value);
  return std::make_unique<int>(value / 2);
}

Status Quarter(int value, int* out) {
  MR_ASSIGN_OR_RETURN(const std::unique_ptr<int> half, Half(value));
  MR_ASSIGN_OR_RETURN(const std::unique_ptr<int> quarter, Half(*half));
  *out = *quarter;
  return OkStatus();
}

TEST(Status, MacrosPassErrorsUpAndMoveValues) {
  int out = 0;
  EXPECT_TRUE(Quarter(8, &out).ok());
  EXPECT_EQ(out, 2);
  const Status status = Quarter(6, &out);
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(Message(Annotate(status, "quarter")), "quarter: 3 is odd");
  EXPECT_TRUE(Annotate(OkStatus(), "x").ok());
}

TEST(CheckDeathTest, SaysWhatAndWhere) {
  EXPECT_DEATH(MR_CHECK(1 == 2, "one is {}", 1), "check failed: 1 == 2 one is 1");
  MR_CHECK(true);
}

TEST(ThreadCheckerDeathTest, RefusesASecondThread) {
  ThreadChecker checker;
  checker.Check();
  EXPECT_DEATH(std::thread([&] { checker.Check(); }).join(), "does not own");
}

TEST(FakeClock, MovesOnlyWhenTold) {
  FakeClock clock;
  const TimePoint start = clock.Now();
  EXPECT_EQ(clock.Now(), start);
  clock.Advance(std::chrono::seconds(2));
  EXPECT_EQ(Seconds(clock.Now() - start), 2);
}

TEST(Cpu, CountsAtLeastOneProcessor) {
  EXPECT_GE(UsableCpuCount(), 1);
  EXPECT_EQ(&GetCpuFeatures(), &GetCpuFeatures());
}

}  // namespace
}  // namespace millrace
