#pragma once
// What one gateway counts of its requests: where their time went, tokens, ends.

#include <string>

#include "base/clock.h"
#include "base/metrics.h"
#include "server/gateway/request_log.h"

namespace millrace::server {

// Thread-safe. `metrics` outlives it.
class RequestMetrics {
 public:
  explicit RequestMetrics(Metrics& metrics);

  // Between two tokens of one choice, as they came from its worker.
  void OnTokenGap(Duration gap) { inter_token_.Observe(Seconds(gap)); }
  void OnFinish(const std::string& finish_reason);  // of a choice
  // Once for every request, with its outcome. A request that failed enters no latency but the phases that it
  // went through.
  void OnEnd(const RequestRecord& record);
  // What is only looked at when somebody asks.
  void SetNow(int32_t waiting, int32_t running, int32_t connections);

 private:
  void ObservePhases(const RequestRecord& record);
  void Phase(const char* name, Duration took);

  Metrics& metrics_;
  prometheus::Histogram& time_to_first_token_;
  prometheus::Histogram& inter_token_;
  prometheus::Histogram& time_per_output_token_;
  prometheus::Histogram& duration_;
  prometheus::Histogram& inference_;
  prometheus::Histogram& prompt_tokens_;
  prometheus::Histogram& output_tokens_;
  prometheus::Histogram& longest_choice_;
  prometheus::Counter& cached_tokens_;
  prometheus::Gauge& waiting_;
  prometheus::Gauge& running_;
  prometheus::Gauge& connections_;
};

}  // namespace millrace::server
