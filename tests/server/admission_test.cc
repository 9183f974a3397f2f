#include "server/gateway/admission.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <map>
#include <string>
#include <vector>

namespace millrace::server {
namespace {

using ::testing::ElementsAre;
using ::testing::IsEmpty;

class AdmissionTest : public ::testing::Test {
 protected:
  // Enters a request called `name`; decisions are noted in `log_` as "name" or "name refused".
  Admission::Ticket Enter(Admission& admission, const std::string& name, const std::string& key,
                          int32_t priority = 0, int32_t choices = 1, int64_t prompt_tokens = 100) {
    return admission.Enter({key, priority, choices, prompt_tokens}, [this, name](const Status& status) {
      log_.push_back(status.ok() ? name : name + " refused");
    });
  }
  std::vector<std::string> log_;
};

TEST_F(AdmissionTest, RunsUpToTheLimitThenQueues) {
  Admission admission({.running_max = 2, .queue_max = 1});
  auto a = Enter(admission, "a", "k");
  auto b = Enter(admission, "b", "k");
  auto c = Enter(admission, "c", "k");
  auto d = Enter(admission, "d", "k");
  EXPECT_THAT(log_, ElementsAre("a", "b", "d refused"));
  EXPECT_EQ(admission.counts().waiting, 1);
  a.Leave(10);
  EXPECT_THAT(log_, ElementsAre("a", "b", "d refused", "c"));
  b.Leave(0);
  c.Leave(0);
  EXPECT_EQ(admission.counts().waiting + admission.counts().running, 0);
}

TEST_F(AdmissionTest, ForgetsWhoLeavesTheQueue) {
  Admission admission({.running_max = 1, .queue_max = 8});
  auto a = Enter(admission, "a", "k");
  auto b = Enter(admission, "b", "k");
  auto c = Enter(admission, "c", "k");
  { auto gone = std::move(b); }
  a.Leave(1);
  EXPECT_THAT(log_, ElementsAre("a", "c"));
}

TEST_F(AdmissionTest, SharesBetweenKeysByTokens) {
  Admission admission({.running_max = 1, .queue_max = 1000});
  std::map<std::string, Admission::Ticket> tickets;
  tickets["first"] = Enter(admission, "first", "z");
  // One key floods with short requests, another asks for long ones.
  for (int i = 0; i < 200; ++i) {
    const std::string small = "small" + std::to_string(i);
    tickets[small] = Enter(admission, small, "flood", 0, 1, 10);
    const std::string large = "large" + std::to_string(i);
    if (i < 20) tickets[large] = Enter(admission, large, "calm", 0, 1, 100);
  }
  tickets["first"].Leave(0);
  std::map<std::string, int> tokens;
  for (size_t i = 1; i < 111; ++i) {  // log_[i] runs now; its end starts the next
    const std::string name = log_.at(i);
    tokens[name.substr(0, 5)] += name.starts_with("small") ? 10 : 100;
    tickets[name].Leave(0);
  }
  EXPECT_NEAR(tokens["small"], tokens["large"], 100) << "each key got the same number of tokens";
}

TEST_F(AdmissionTest, ServesPriorityWithinAKeyOnly) {
  Admission admission({.running_max = 1, .queue_max = 10});
  auto a = Enter(admission, "a", "k", 0, 1, 0);
  auto low = Enter(admission, "low", "k", 0);
  auto high = Enter(admission, "high", "k", 5);
  auto other = Enter(admission, "other", "l", -5);
  a.Leave(0);
  high.Leave(0);
  EXPECT_THAT(log_, ElementsAre("a", "high", "other")) << "after k's 100 tokens it is l's turn";
}

TEST_F(AdmissionTest, MakesRoomForAKeyThatHasLess) {
  Admission admission({.running_max = 1, .queue_max = 3});
  auto a = Enter(admission, "a", "greedy");
  auto b = Enter(admission, "b", "greedy");
  auto c = Enter(admission, "c", "greedy");
  auto d = Enter(admission, "d", "greedy");
  auto e = Enter(admission, "e", "modest");
  EXPECT_THAT(log_, ElementsAre("a", "d refused"));
  auto f = Enter(admission, "f", "modest");  // two and one: taking turns would only push one out for another
  EXPECT_THAT(log_, ElementsAre("a", "d refused", "f refused"));
  EXPECT_EQ(admission.counts().waiting, 3);
}

TEST_F(AdmissionTest, GivesNothingForIdling) {
  Admission admission({.running_max = 1, .queue_max = 100});
  auto a = Enter(admission, "a", "busy", 0, 1, 10'000);
  auto b = Enter(admission, "b", "busy");
  auto c = Enter(admission, "c", "new");
  auto d = Enter(admission, "d", "new");
  a.Leave(0);
  EXPECT_EQ(log_.size(), 2U);
  // "new" began at the meter of "busy", so it does not get 10,000 tokens first.
  b.Leave(0);
  c.Leave(0);
  EXPECT_THAT(log_, ElementsAre("a", "b", "c", "d"));
}

TEST_F(AdmissionTest, LetsAWideRequestRunAlone) {
  Admission admission({.running_max = 4, .queue_max = 10});
  auto a = Enter(admission, "a", "k", 0, 2);
  auto wide = Enter(admission, "wide", "k", 0, 16);
  auto b = Enter(admission, "b", "k", 0, 1);
  EXPECT_THAT(log_, ElementsAre("a"));
  a.Leave(0);
  EXPECT_THAT(log_, ElementsAre("a", "wide"));
  wide.Leave(0);
  EXPECT_THAT(log_, ElementsAre("a", "wide", "b"));
}

TEST_F(AdmissionTest, SaysWhenToComeBackFromTheMeasuredRate) {
  FakeClock clock;
  Admission admission({.running_max = 1, .queue_max = 100, .clock = &clock});
  EXPECT_EQ(admission.RetryAfterSeconds(), 1);
  for (int i = 0; i < 50; ++i) {
    auto ticket = Enter(admission, "x", "k");
    clock.Advance(std::chrono::seconds(2));
  }
  std::vector<Admission::Ticket> waiting;
  for (int i = 0; i < 6; ++i) waiting.push_back(Enter(admission, "y", "k"));
  EXPECT_EQ(admission.RetryAfterSeconds(), 2 * (5 + 1)) << "2 s each, 5 wait";
  for (int i = 0; i < 90; ++i) waiting.push_back(Enter(admission, "y", "k"));
  EXPECT_EQ(admission.RetryAfterSeconds(), 60) << "never more than a minute";
  while (!waiting.empty()) waiting.pop_back();
  EXPECT_EQ(admission.counts().running, 0);
}

}  // namespace
}  // namespace millrace::server
