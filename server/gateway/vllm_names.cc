#include "server/gateway/vllm_names.h"

#include <prometheus/metric_family.h>

#include <algorithm>
#include <string_view>
#include <utility>

namespace millrace::server {
namespace {

struct Name {
  std::string_view ours;
  std::string_view phase;  // not empty: only the metrics with this phase, without the label
  const char* vllm;
};

constexpr Name kNames[] = {
    // The engine's, on every worker.
    {"millrace_engine_waiting", "", "vllm:num_requests_waiting"},
    {"millrace_engine_running", "", "vllm:num_requests_running"},
    {"millrace_engine_kv_used_ratio", "", "vllm:kv_cache_usage_perc"},
    {"millrace_engine_prefix_cache_asked_tokens_total", "", "vllm:prefix_cache_queries_total"},
    {"millrace_engine_prefix_cache_found_tokens_total", "", "vllm:prefix_cache_hits_total"},
    {"millrace_engine_prompt_tokens_total", "", "vllm:prompt_tokens_total"},
    {"millrace_engine_output_tokens_total", "", "vllm:generation_tokens_total"},
    {"millrace_engine_preemptions_total", "", "vllm:num_preemptions_total"},
    {"millrace_engine_drafted_tokens_total", "", "vllm:spec_decode_num_draft_tokens_total"},
    {"millrace_engine_accepted_tokens_total", "", "vllm:spec_decode_num_accepted_tokens_total"},
    {"millrace_engine_batch_tokens", "", "vllm:iteration_tokens_total"},
    // The gateway's.
    {"millrace_time_to_first_token_seconds", "", "vllm:time_to_first_token_seconds"},
    {"millrace_inter_token_seconds", "", "vllm:inter_token_latency_seconds"},
    {"millrace_time_per_output_token_seconds", "", "vllm:request_time_per_output_token_seconds"},
    {"millrace_request_seconds", "", "vllm:e2e_request_latency_seconds"},
    {"millrace_request_prompt_tokens", "", "vllm:request_prompt_tokens"},
    {"millrace_request_output_tokens", "", "vllm:request_generation_tokens"},
    {"millrace_answers_total", "", "vllm:request_success_total"},
    {"millrace_request_phase_seconds", "queue", "vllm:request_queue_time_seconds"},
    {"millrace_request_phase_seconds", "compute", "vllm:request_prefill_time_seconds"},
    {"millrace_request_phase_seconds", "decode", "vllm:request_decode_time_seconds"},
};

// Takes the label away; false when it is not there with this value.
bool TakePhase(prometheus::ClientMetric* metric, std::string_view phase) {
  const auto found = std::find_if(metric->label.begin(), metric->label.end(), [&](const auto& label) {
    return label.name == "phase" && label.value == phase;
  });
  if (found == metric->label.end()) return false;
  metric->label.erase(found);
  return true;
}

}  // namespace

std::vector<prometheus::MetricFamily> VllmNames::Collect() const {
  const std::vector<prometheus::MetricFamily> families = source_->Collect();
  std::vector<prometheus::MetricFamily> renamed;
  for (const Name& name : kNames) {
    const auto family = std::find_if(families.begin(), families.end(),
                                     [&](const auto& candidate) { return candidate.name == name.ours; });
    if (family == families.end()) continue;
    prometheus::MetricFamily copy = *family;
    copy.name = name.vllm;
    if (!name.phase.empty())
      std::erase_if(copy.metric, [&](auto& metric) { return !TakePhase(&metric, name.phase); });
    for (prometheus::ClientMetric& metric : copy.metric) {
      metric.label.push_back({"model_name", model_name_});
      metric.label.push_back({"engine", "0"});
    }
    if (!copy.metric.empty()) renamed.push_back(std::move(copy));
  }
  return renamed;
}

}  // namespace millrace::server
