#include "server/gateway/vllm_names.h"

#include <prometheus/metric_family.h>

#include <algorithm>
#include <string_view>
#include <utility>

namespace millrace::server {
namespace {

struct Name {
  std::string_view ours;
  std::string_view selected;  // "label=value": only the metrics that have it, without it
  const char* theirs;
  std::string_view added = {};    // "label=value" that theirs has
  std::string_view renamed = {};  // "ours=theirs": a label
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
    // A draft has one token.
    {"millrace_engine_drafted_tokens_total", "", "vllm:spec_decode_num_drafts_total"},
    {"millrace_engine_drafted_tokens_total", "", "vllm:spec_decode_num_draft_tokens_total"},
    {"millrace_engine_accepted_tokens_total", "", "vllm:spec_decode_num_accepted_tokens_total"},
    {"millrace_engine_accepted_tokens_total", "", "vllm:spec_decode_num_accepted_tokens_per_pos_total",
     "position=0"},
    {"millrace_engine_batch_tokens", "", "vllm:iteration_tokens_total"},
    // The hand-over's, on decode workers; the queues, which vLLM has not, under SGLang's names.
    {"millrace_kv_wire_seconds", "", "vllm:nixl_xfer_time_seconds"},
    {"millrace_kv_post_seconds", "", "vllm:nixl_post_time_seconds"},
    {"millrace_kv_bytes", "", "vllm:nixl_bytes_transferred"},
    {"millrace_kv_pieces", "", "vllm:nixl_num_descriptors"},
    {"millrace_kv_failures_total", "", "vllm:nixl_num_failed_transfers_total"},
    {"millrace_worker_queue", "queue=prefill_prealloc", "sglang:num_prefill_prealloc_queue_reqs"},
    {"millrace_worker_queue", "queue=prefill_inflight", "sglang:num_prefill_inflight_queue_reqs"},
    {"millrace_worker_queue", "queue=decode_prealloc", "sglang:num_decode_prealloc_queue_reqs"},
    {"millrace_worker_queue", "queue=decode_transfer", "sglang:num_decode_transfer_queue_reqs"},
    // The gateway's.
    {"millrace_time_to_first_token_seconds", "", "vllm:time_to_first_token_seconds"},
    {"millrace_inter_token_seconds", "", "vllm:inter_token_latency_seconds"},
    {"millrace_time_per_output_token_seconds", "", "vllm:request_time_per_output_token_seconds"},
    {"millrace_request_seconds", "", "vllm:e2e_request_latency_seconds"},
    {"millrace_request_inference_seconds", "", "vllm:request_inference_time_seconds"},
    {"millrace_request_prompt_tokens", "", "vllm:request_prompt_tokens"},
    {"millrace_request_output_tokens", "", "vllm:request_generation_tokens"},
    {"millrace_request_longest_choice_tokens", "", "vllm:request_max_num_generation_tokens"},
    {"millrace_answers_total", "", "vllm:request_success_total"},
    {"millrace_http_requests_total", "", "http_requests_total", "", "path=handler"},
    // OpenTelemetry's, as Prometheus writes them.
    {"millrace_time_to_first_token_seconds", "", "gen_ai_server_time_to_first_token_seconds",
     "gen_ai_provider_name=millrace", "model_name=gen_ai_request_model"},
    {"millrace_time_per_output_token_seconds", "", "gen_ai_server_time_per_output_token_seconds",
     "gen_ai_provider_name=millrace", "model_name=gen_ai_request_model"},
    {"millrace_request_seconds", "", "gen_ai_server_request_duration_seconds",
     "gen_ai_provider_name=millrace", "model_name=gen_ai_request_model"},
    // Those of Dynamo's frontend that mean the same.
    {"millrace_time_to_first_token_seconds", "", "dynamo_frontend_time_to_first_token_seconds", "",
     "model_name=model"},
    {"millrace_inter_token_seconds", "", "dynamo_frontend_inter_token_latency_seconds", "",
     "model_name=model"},
    {"millrace_request_seconds", "", "dynamo_frontend_request_duration_seconds", "", "model_name=model"},
    {"millrace_request_prompt_tokens", "", "dynamo_frontend_input_sequence_tokens", "", "model_name=model"},
    {"millrace_request_output_tokens", "", "dynamo_frontend_output_sequence_tokens", "", "model_name=model"},
    {"millrace_request_phase_seconds", "phase=queue", "vllm:request_queue_time_seconds"},
    {"millrace_request_phase_seconds", "phase=compute", "vllm:request_prefill_time_seconds"},
    {"millrace_request_phase_seconds", "phase=decode", "vllm:request_decode_time_seconds"},
};

std::pair<std::string_view, std::string_view> Split(std::string_view label) {
  const size_t equals = label.find('=');
  return {label.substr(0, equals), label.substr(equals + 1)};
}

// Takes the label away; false when it is not there with this value.
bool TakeLabel(prometheus::ClientMetric* metric, std::string_view selected) {
  const auto [name, value] = Split(selected);
  const auto found = std::find_if(metric->label.begin(), metric->label.end(), [&](const auto& label) {
    return label.name == name && label.value == value;
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
    copy.name = name.theirs;
    if (!name.selected.empty())
      std::erase_if(copy.metric, [&](auto& metric) { return !TakeLabel(&metric, name.selected); });
    for (prometheus::ClientMetric& metric : copy.metric) {
      metric.label.push_back({"model_name", model_name_});
      metric.label.push_back({"engine", "0"});
      if (!name.added.empty()) {
        const auto [label, value] = Split(name.added);
        metric.label.push_back({std::string(label), std::string(value)});
      }
      const auto [old_label, new_label] = Split(name.renamed);
      for (prometheus::ClientMetric::Label& label : metric.label) {
        if (!name.renamed.empty() && label.name == old_label) label.name = new_label;
      }
    }
    if (!copy.metric.empty()) renamed.push_back(std::move(copy));
  }
  return renamed;
}

}  // namespace millrace::server
