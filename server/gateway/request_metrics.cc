#include "server/gateway/request_metrics.h"

#include <algorithm>
#include <vector>

namespace millrace::server {
namespace {

// Seconds. The first are those of vLLM's histograms of the same meaning, so that dashboards agree; the second
// are finer below 10 ms, which is where tokens of small models are.
const std::vector<double> kFirstTokenBuckets = {0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1,
                                                0.25,  0.5,   0.75, 1,    2.5,  5,    7.5,  10,
                                                20,    40,    80,   160,  640,  2560};
const std::vector<double> kTokenBuckets = {0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1,
                                           0.15,  0.2,    0.3,   0.4,  0.5,   0.75, 1,     2.5,
                                           5,     7.5,    10,    20,   40,    80};
const std::vector<double> kDurationBuckets = {0.05, 0.1, 0.3, 0.5, 0.8, 1,   1.5, 2,   2.5, 5,    10,  15,
                                              20,   30,  40,  50,  60,  120, 240, 480, 960, 1920, 7680};
const std::vector<double> kPhaseBuckets = {0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05,
                                           0.1,    0.2,    0.5,    1,     2,     5,     10,   30,   100};
const std::vector<double> kCountBuckets = {1,   2,    5,    10,   20,    50,    100,   200,
                                           500, 1000, 2000, 5000, 10000, 20000, 50000, 100000};

}  // namespace

RequestMetrics::RequestMetrics(Metrics& metrics)
    : metrics_(metrics),
      time_to_first_token_(metrics.Histogram("millrace_time_to_first_token_seconds",
                                             "From the request to the first token of its answer.",
                                             kFirstTokenBuckets)),
      inter_token_(metrics.Histogram("millrace_inter_token_seconds", "Between two tokens of one choice.",
                                     kTokenBuckets)),
      time_per_output_token_(metrics.Histogram("millrace_time_per_output_token_seconds",
                                               "After the first token, per token: mean of each request.",
                                               kTokenBuckets)),
      duration_(metrics.Histogram("millrace_request_seconds", "From the request to the end of its answer.",
                                  kDurationBuckets)),
      inference_(metrics.Histogram("millrace_request_inference_seconds",
                                   "From the request's admission to the end of its answer.",
                                   kDurationBuckets)),
      prompt_tokens_(metrics.Histogram("millrace_request_prompt_tokens",
                                       "Tokens of the prompts of a request.", kCountBuckets)),
      output_tokens_(metrics.Histogram("millrace_request_output_tokens", "Tokens of the answer to a request.",
                                       kCountBuckets)),
      longest_choice_(metrics.Histogram("millrace_request_longest_choice_tokens",
                                        "Tokens of the longest choice of the answer to a request.",
                                        kCountBuckets)),
      cached_tokens_(metrics.Counter("millrace_cached_prompt_tokens_total",
                                     "Tokens of prompts found in a prefix cache.")),
      waiting_(metrics.Gauge("millrace_gateway_waiting", "Requests that wait in the gateway.")),
      running_(metrics.Gauge("millrace_gateway_running", "Choices that the workers make for the gateway.")),
      connections_(metrics.Gauge("millrace_gateway_connections", "Open connections of clients.")) {}

void RequestMetrics::OnFinish(const std::string& finish_reason) {
  metrics_
      .Counter("millrace_answers_total", "Choices that came to their end, by how.",
               {{"finished_reason", finish_reason}})
      .Increment();
}

void RequestMetrics::OnEnd(const RequestRecord& record) {
  metrics_
      .Counter("millrace_requests_total", "Requests that ended, by outcome.", {{"outcome", record.outcome}})
      .Increment();
  ObservePhases(record);
  if (record.outcome != "ok") return;
  time_to_first_token_.Observe(Seconds(record.first_token - record.accepted));
  duration_.Observe(Seconds(record.ended - record.accepted));
  inference_.Observe(Seconds(record.ended - record.admitted));
  prompt_tokens_.Observe(record.prompt_tokens);
  output_tokens_.Observe(record.completion_tokens);
  longest_choice_.Observe(record.longest_choice_tokens);
  cached_tokens_.Increment(record.cached_tokens);
  if (record.completion_tokens > 1)
    time_per_output_token_.Observe(Seconds(record.ended - record.first_token) /
                                   (record.completion_tokens - 1));
}

// The first three add up to the time to the first token, but for what the gateway and the wires to the
// workers take.
void RequestMetrics::ObservePhases(const RequestRecord& record) {
  if (record.admitted == TimePoint()) return;
  Phase("queue", record.admitted - record.accepted);
  if (record.first_token == TimePoint()) return;
  const PhaseTimes& phases = record.phases;
  if (phases.known) {
    Phase("grant_wait", std::chrono::microseconds(phases.queue_us));
    Phase("compute", std::chrono::microseconds(phases.prefill_us));
    if (!phases.prefill_worker.empty()) {
      Phase("post", std::chrono::microseconds(phases.post_us));
      Phase("wire", std::chrono::microseconds(
                        std::max<int64_t>(0, phases.transfer_us - phases.post_us - phases.commit_us)));
      Phase("commit", std::chrono::microseconds(phases.commit_us));
    }
  }
  if (record.second_token == TimePoint()) return;
  if (phases.known) {
    const Duration decode =
        record.second_token - record.first_token - std::chrono::microseconds(phases.transfer_us);
    Phase("first_decode", std::max(Duration(0), decode));
  }
  Phase("decode", record.ended - record.first_token);
}

void RequestMetrics::Phase(const char* name, Duration took) {
  metrics_
      .Histogram("millrace_request_phase_seconds",
                 "Where the time of a request's first choice went. To the first token: queue (in the "
                 "gateway), grant_wait (for pages "
                 "of the decode worker), compute (the prompt). From the first token to the second, of which "
                 "the first three are "
                 "the rest of the KV transfer: post (writes not submitted yet), wire (until the seal), "
                 "commit (close, digest), "
                 "first_decode. decode is from the first token to the last.",
                 kPhaseBuckets, {{"phase", name}})
      .Observe(Seconds(took));
}

void RequestMetrics::SetNow(int32_t waiting, int32_t running, int32_t connections) {
  waiting_.Set(waiting);
  running_.Set(running);
  connections_.Set(connections);
}

}  // namespace millrace::server
