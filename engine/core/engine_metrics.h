#pragma once
// What the engine tells Prometheus: millrace_engine_*. Engine thread only.

#include "base/metrics.h"
#include "engine/core/engine.h"

namespace millrace::engine {

class EngineMetrics {
 public:
  explicit EngineMetrics(Metrics* metrics);  // outlives this
  void Update(const EngineStats& stats);
  void OnStep(double seconds, int32_t batch_tokens);

 private:
  prometheus::Gauge& pages_total_;
  prometheus::Gauge& pages_free_;
  prometheus::Gauge& pages_cached_;
  prometheus::Gauge& pages_ticket_only_;
  prometheus::Gauge& kv_used_ratio_;
  prometheus::Gauge& waiting_;
  prometheus::Gauge& running_;
  prometheus::Gauge& importing_;
  prometheus::Gauge& tickets_;
  prometheus::Counter& steps_;
  prometheus::Counter& prompt_tokens_;
  prometheus::Counter& output_tokens_;
  prometheus::Counter& preemptions_;
  prometheus::Counter& cache_asked_tokens_;
  prometheus::Counter& cache_found_tokens_;
  prometheus::Gauge& host_tier_pages_;
  prometheus::Gauge& disk_tier_pages_;
  prometheus::Counter& host_tier_loads_;
  prometheus::Counter& disk_tier_loads_;
  prometheus::Counter& disk_tier_failures_;
  prometheus::Counter& drafted_tokens_;
  prometheus::Counter& accepted_tokens_;
  prometheus::Histogram& step_seconds_;
  prometheus::Histogram& batch_tokens_;
  EngineStats last_;  // counters are told as differences
};

}  // namespace millrace::engine
