#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>

#include "server/bench/answer_meter.h"
#include "server/bench/summary.h"
#include "server/bench/workload.h"

namespace millrace::server {
namespace {

using std::chrono::milliseconds;

TimePoint At(int64_t ms) { return TimePoint(Duration(milliseconds(1'000'000 + ms))); }

// Mean and coefficient of variation of the intervals between arrivals.
std::pair<double, double> ArrivalIntervals(double burstiness) {
  WorkloadOptions options;
  options.arrival = WorkloadOptions::Arrival::kRate;
  options.rate = 50;
  options.burstiness = burstiness;
  auto workload = *Workload::Create(options);
  constexpr int kCount = 20000;
  double last = 0, sum = 0, squares = 0;
  EXPECT_EQ(workload.Next()->at, 0);
  for (int i = 0; i < kCount; ++i) {
    const double at = workload.Next()->at;
    sum += at - last;
    squares += (at - last) * (at - last);
    last = at;
  }
  const double mean = sum / kCount;
  return {mean, std::sqrt(std::max(0.0, squares / kCount - mean * mean)) / mean};
}

TEST(WorkloadTest, ArrivalsHaveTheRateAndTheShapeAskedFor) {
  for (const double shape : {1.0, 0.25, 4.0}) {
    const auto [mean, variation] = ArrivalIntervals(shape);
    EXPECT_NEAR(mean, 0.02, 0.001) << shape;
    EXPECT_NEAR(variation, 1 / std::sqrt(shape), 0.06) << shape;  // of a gamma distribution
  }
  const auto [mean, variation] = ArrivalIntervals(std::numeric_limits<double>::infinity());
  EXPECT_NEAR(mean, 0.02, 1e-9);
  EXPECT_NEAR(variation, 0, 1e-3);
}

TEST(WorkloadTest, RampIsTheInverseOfItsIntegral) {
  const auto integral = [](double t, double rate, double to, double ramp) {
    return t < ramp ? rate * t + (to - rate) * t * t / (2 * ramp) : (rate + to) / 2 * ramp + to * (t - ramp);
  };
  for (const double to : {1.0, 5.0, 40.0}) {
    for (const double t : {0.0, 0.5, 3.0, 9.99, 10.0, 25.0}) {
      EXPECT_NEAR(TimeOfArrival(integral(t, 5, to, 10), 5, to, 10), t, 1e-9) << to << " at " << t;
    }
  }
  EXPECT_DOUBLE_EQ(TimeOfArrival(10, 5, 0, 0), 2);
}

TEST(WorkloadTest, RangesNameTheFlag) {
  EXPECT_EQ(ParseIntRange("--x", "7", 1)->high, 7);
  EXPECT_EQ(ParseIntRange("--x", "2:9", 1)->low, 2);
  for (const char* bad : {"", "a", "1:", ":2", "3:2", "0", "1:2:3", "5x"}) {
    const auto range = ParseIntRange("--x", bad, 1);
    ASSERT_FALSE(range.ok()) << bad;
    EXPECT_NE(std::string(Message(range.status())).find("--x"), std::string::npos);
  }
}

TEST(AnswerMeterTest, TakesTheStreamInAnyPieces) {
  const std::string stream =
      ": keepalive\r\n\r\nevent: x\ndata: "
      "{\"choices\":[{\"index\":0,\"delta\":{\"role\":\"assistant\",\"content\":\"\"}}]}\n\n"
      "data:{\"choices\":[{\"index\":0,\"delta\":{\"reasoning_content\":\"h\"}}]}\n\n"
      "data: {\"choices\":[{\"index\":0,\"delta\":{\"content\":\"a\"}}]}\r\n\r\n"
      "data: {\"choices\":[{\"index\":0,\"delta\":{},\"finish_reason\":\"stop\"}]}\n\n"
      "data: "
      "{\"choices\":[],\"usage\":{\"prompt_tokens\":3,\"completion_tokens\":2,\"prompt_tokens_details\":{"
      "\"cached_tokens\":1}}}\n\n"
      "data: [DONE]\n\n";
  for (size_t piece : {size_t{1}, size_t{7}, stream.size()}) {
    RequestResult result;
    AnswerMeter meter(true, &result);
    for (size_t at = 0; at < stream.size(); at += piece)
      meter.Add(std::string_view(stream).substr(at, piece), At(5));
    meter.End(true, At(6));
    EXPECT_TRUE(result.served()) << result.message;
    EXPECT_EQ(meter.text(), "a");
    EXPECT_EQ(result.finish_reason, "stop");
    EXPECT_EQ(result.output_tokens, 2);
    EXPECT_EQ(result.cached_tokens, 1);
    EXPECT_EQ(result.gaps_ns.size(), 1u) << "reasoning is the first token";
    EXPECT_FALSE(result.tokens_per_chunk);
  }
}

TEST(AnswerMeterTest, AnAnswerWithoutItsEndIsBroken) {
  RequestResult result;
  AnswerMeter meter(true, &result);
  meter.Add("data: {\"choices\":[{\"delta\":{\"content\":\"a\"}}]}\n\n", At(1));
  meter.End(true, At(2));
  EXPECT_EQ(result.error, RequestError::kBroken);
  RequestResult garbage;
  AnswerMeter other(true, &garbage);
  other.Add("data: {nonsense\n\n", At(1));
  other.End(true, At(2));
  EXPECT_EQ(garbage.error, RequestError::kMalformed);
}

TEST(SummaryTest, ConfidenceIntervalIsStudents) {
  // Mean 2, standard deviation 1, n = 3: half-width 4.303 / sqrt(3).
  std::vector<OrderedJson> runs;
  for (const double value : {1.0, 2.0, 3.0}) runs.push_back({{"a", {{"b", value}}}});
  const OrderedJson interval = Intervals(runs)["a"]["b"];
  EXPECT_DOUBLE_EQ(interval["mean"].get<double>(), 2);
  EXPECT_NEAR(interval["high"].get<double>() - 2, 4.303 / std::sqrt(3.0), 1e-3);
  EXPECT_NEAR(2 - interval["low"].get<double>(), 4.303 / std::sqrt(3.0), 1e-3);
}

TEST(SummaryTest, WarmUpAndFailuresEnterNoLatency) {
  LoadResult run;
  run.start = At(0);
  for (int i = 0; i < 4; ++i) {
    RequestResult r;
    r.intended = r.sent = At(i * 1000);
    r.first = At(i * 1000 + 100 * (i + 1));
    r.end = At(i * 1000 + 500);
    r.output_tokens = 5;
    if (i == 3) r.error = RequestError::kServer;
    run.requests.push_back(r);
  }
  Objectives objectives = *ParseObjectives("ttft=250ms,tpot=1s");
  const OrderedJson s = Summarise(run, 0.5, objectives);
  EXPECT_EQ(s["requests"]["warmup"], 1);
  EXPECT_EQ(s["requests"]["counted"], 3);
  EXPECT_EQ(s["latency"]["ttft"]["count"], 2);
  EXPECT_NEAR(s["latency"]["ttft"]["max"].get<double>(), 0.3, 1e-9);
  EXPECT_NEAR(s["goodput"]["share"].get<double>(), 1.0 / 3, 1e-9);
  EXPECT_NEAR(s["latency"]["tpot"]["max"].get<double>(), 0.3 / 4, 0.3 / 4 * 0.01);
}

TEST(SummaryTest, ObjectivesAreChecked) {
  EXPECT_FALSE(ParseObjectives("")->any());
  EXPECT_DOUBLE_EQ(*ParseObjectives("e2e=2s")->e2e, 2);
  for (const char* bad : {"ttft", "ttft=5", "ttft=-1s", "x=1s", "ttft=1h"})
    EXPECT_FALSE(ParseObjectives(bad).ok()) << bad;
}

}  // namespace
}  // namespace millrace::server
