#include "server/worker/worker_metrics.h"

namespace millrace::server {
namespace {

std::string CodeLabel(const Status& status) {
  const auto name = absl::StatusCodeToString(status.code());
  return std::string(name.data(), name.size());
}

}  // namespace

WorkerMetrics::WorkerMetrics(Metrics* metrics) : metrics_(metrics) {
  if (metrics_ == nullptr) return;
  for (int i = 0; i + 1 < kTicketStates; ++i) {
    tickets_[static_cast<size_t>(i)] =
        &metrics_->Gauge("millrace_worker_tickets", "Tickets that exist, by state.",
                         {{"state", Name(static_cast<TicketState>(i))}});
  }
  bytes_ =
      &metrics_->Counter("millrace_worker_transfer_bytes_total", "KV bytes acknowledged by decode workers.");
}

void WorkerMetrics::OnRequest(const char* kind, const Status& outcome) {
  if (metrics_ == nullptr) return;
  metrics_
      ->Counter("millrace_worker_requests_total", "Requests that ended, by status code.",
                {{"kind", kind}, {"outcome", CodeLabel(outcome)}})
      .Increment();
}

void WorkerMetrics::OnPrefillAttempt(const char* outcome) {
  if (metrics_ == nullptr) return;
  metrics_
      ->Counter("millrace_worker_prefill_attempts_total", "Prompts handed to prefill workers, by outcome.",
                {{"outcome", outcome}})
      .Increment();
}

void WorkerMetrics::OnTransferred(uint64_t bytes) {
  if (bytes_ != nullptr) bytes_->Increment(static_cast<double>(bytes));
}

void WorkerMetrics::OnPhase(const char* phase, Duration took) {
  if (metrics_ == nullptr) return;
  metrics_
      ->Histogram("millrace_worker_phase_seconds", "Where the time of a request went.",
                  {0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30},
                  {{"phase", phase}})
      .Observe(Seconds(took));
}

void WorkerMetrics::OnBegin(TicketState state) {
  ++open_tickets_;
  if (metrics_ != nullptr) tickets_[static_cast<size_t>(state)]->Increment();
}

void WorkerMetrics::OnMove(TicketState from, TicketState to) {
  if (to == TicketState::kReleased) --open_tickets_;
  if (metrics_ == nullptr) return;
  tickets_[static_cast<size_t>(from)]->Decrement();
  if (to != TicketState::kReleased) tickets_[static_cast<size_t>(to)]->Increment();
}

}  // namespace millrace::server
