#include "engine/core/engine_metrics.h"

namespace millrace::engine {
namespace {

prometheus::Gauge& GaugeOf(Metrics* metrics, const char* name, const char* help) {
  return metrics->Gauge(std::string("millrace_engine_") + name, help);
}

prometheus::Counter& CounterOf(Metrics* metrics, const char* name, const char* help) {
  return metrics->Counter(std::string("millrace_engine_") + name, help);
}

}  // namespace

EngineMetrics::EngineMetrics(Metrics* metrics)
    : pages_total_(GaugeOf(metrics, "pages", "KV pages in the pool")),
      pages_free_(GaugeOf(metrics, "pages_free", "KV pages that nobody holds but the prefix cache")),
      pages_cached_(GaugeOf(metrics, "pages_cached", "Free KV pages that the prefix cache has content in")),
      pages_ticket_only_(
          GaugeOf(metrics, "pages_ticket_only", "KV pages that only a transfer's ticket holds")),
      kv_used_ratio_(
          GaugeOf(metrics, "kv_used_ratio", "Part of the KV pages that cannot be had at once, 0 to 1")),
      waiting_(GaugeOf(metrics, "waiting", "Requests queued, waits for import pages included")),
      running_(GaugeOf(metrics, "running", "Sequences in prefill or decode")),
      importing_(GaugeOf(metrics, "importing", "Requests whose KV is on its way from a prefill worker")),
      tickets_(GaugeOf(metrics, "tickets", "Requests whose ticket holds pages")),
      steps_(CounterOf(metrics, "steps_total", "Batches computed")),
      prompt_tokens_(
          CounterOf(metrics, "prompt_tokens_total", "Prompt tokens computed, recomputation included")),
      output_tokens_(CounterOf(metrics, "output_tokens_total", "Tokens sampled")),
      preemptions_(
          CounterOf(metrics, "preemptions_total", "Sequences that gave up their pages to be recomputed")),
      cache_asked_tokens_(CounterOf(metrics, "prefix_cache_asked_tokens_total",
                                    "Tokens of admitted requests that the prefix cache was asked for")),
      cache_found_tokens_(
          CounterOf(metrics, "prefix_cache_found_tokens_total", "Of these, tokens whose KV it had")),
      host_tier_pages_(GaugeOf(metrics, "host_tier_pages", "Cached KV pages in host memory")),
      disk_tier_pages_(GaugeOf(metrics, "disk_tier_pages", "Cached KV pages in the file")),
      host_tier_loads_(
          CounterOf(metrics, "host_tier_loads_total", "Cached KV pages that came back from host memory")),
      disk_tier_loads_(CounterOf(metrics, "disk_tier_loads_total", "Cached KV pages read from the file")),
      disk_tier_failures_(CounterOf(metrics, "disk_tier_failures_total",
                                    "Reads and writes of the file that failed, wrong checksums included")),
      drafted_tokens_(CounterOf(metrics, "drafted_tokens_total",
                                "Tokens that the MTP layer proposed and a step verified")),
      accepted_tokens_(CounterOf(metrics, "accepted_tokens_total", "Of these, tokens that sampling drew")),
      step_seconds_(metrics->Histogram("millrace_engine_step_seconds", "Time of one batch, sampling included",
                                       {0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10})),
      batch_tokens_(metrics->Histogram("millrace_engine_batch_tokens", "Tokens of one batch",
                                       {1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192})) {}

void EngineMetrics::Update(const EngineStats& stats) {
  pages_total_.Set(stats.pages_total);
  pages_free_.Set(stats.pages_free);
  pages_cached_.Set(stats.pages_cached);
  pages_ticket_only_.Set(stats.pages_ticket_only);
  kv_used_ratio_.Set(stats.pages_total == 0 ? 0
                                            : 1 - static_cast<double>(stats.pages_free) / stats.pages_total);
  waiting_.Set(stats.waiting);
  running_.Set(stats.running);
  importing_.Set(stats.importing);
  tickets_.Set(stats.tickets);
  steps_.Increment(static_cast<double>(stats.steps - last_.steps));
  prompt_tokens_.Increment(static_cast<double>(stats.prompt_tokens - last_.prompt_tokens));
  output_tokens_.Increment(static_cast<double>(stats.output_tokens - last_.output_tokens));
  preemptions_.Increment(static_cast<double>(stats.preemptions - last_.preemptions));
  cache_asked_tokens_.Increment(static_cast<double>(stats.cache_asked_tokens - last_.cache_asked_tokens));
  cache_found_tokens_.Increment(static_cast<double>(stats.cache_found_tokens - last_.cache_found_tokens));
  host_tier_pages_.Set(stats.tiers.host_pages);
  disk_tier_pages_.Set(stats.tiers.disk_pages);
  host_tier_loads_.Increment(static_cast<double>(stats.tiers.loaded - last_.tiers.loaded));
  disk_tier_loads_.Increment(static_cast<double>(stats.tiers.fetched - last_.tiers.fetched));
  disk_tier_failures_.Increment(static_cast<double>(stats.tiers.disk_failures - last_.tiers.disk_failures));
  drafted_tokens_.Increment(static_cast<double>(stats.drafted_tokens - last_.drafted_tokens));
  accepted_tokens_.Increment(static_cast<double>(stats.accepted_tokens - last_.accepted_tokens));
  last_ = stats;
}

void EngineMetrics::OnStep(double seconds, int32_t batch_tokens) {
  step_seconds_.Observe(seconds);
  batch_tokens_.Observe(batch_tokens);
}

}  // namespace millrace::engine
