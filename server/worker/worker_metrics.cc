#include "server/worker/worker_metrics.h"

#include <vector>

namespace millrace::server {
namespace {

std::string CodeLabel(const Status& status) {
  const auto name = absl::StatusCodeToString(status.code());
  return std::string(name.data(), name.size());
}

// Prefill workers come and go, their series stay: more than these share one.
constexpr size_t kPeersMax = 64;

const std::vector<double> kKvSeconds = {0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05,
                                        0.1,    0.2,    0.5,    1,     2,     5,     10,   30};
const std::vector<double> kKvBytes = {1 << 16, 1 << 18, 1 << 20, 1 << 22, 1 << 24,
                                      1 << 26, 1 << 28, 1 << 30, 4.295e9, 1.718e10};
const std::vector<double> kKvPieces = {10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000};

prometheus::Gauge* QueueGauge(Metrics* metrics, const char* queue) {
  return &metrics->Gauge(
      "millrace_worker_queue",
      "Prompts on their way between two workers. On a prefill worker: prefill_prealloc, "
      "without pages on the decode worker yet; prefill_inflight, their KV is being sent. "
      "On a decode worker: decode_prealloc, without pages here yet; decode_transfer, until "
      "their KV is committed.",
      {{"queue", queue}});
}

}  // namespace

TicketQueues::TicketQueues(TicketObserver& all, Metrics* metrics, const char* waiting, const char* moving)
    : all_(all) {
  if (metrics == nullptr) return;
  waiting_ = QueueGauge(metrics, waiting);
  moving_ = QueueGauge(metrics, moving);
}

prometheus::Gauge* TicketQueues::QueueOf(TicketState state) const {
  switch (state) {
    case TicketState::kOffered:
      return waiting_;
    case TicketState::kGranted:
    case TicketState::kStreaming:
    case TicketState::kSealed:
      return moving_;
    default:
      return nullptr;
  }
}

void TicketQueues::OnBegin(TicketState state) {
  all_.OnBegin(state);
  if (prometheus::Gauge* const queue = QueueOf(state); queue != nullptr) queue->Increment();
}

void TicketQueues::OnMove(TicketState from, TicketState to) {
  all_.OnMove(from, to);
  if (prometheus::Gauge* const queue = QueueOf(from); queue != nullptr) queue->Decrement();
  if (prometheus::Gauge* const queue = QueueOf(to); queue != nullptr) queue->Increment();
}

WorkerMetrics::WorkerMetrics(Metrics* metrics)
    : metrics_(metrics),
      imports_(*this, metrics, "decode_prealloc", "decode_transfer"),
      exports_(*this, metrics, "prefill_prealloc", "prefill_inflight") {
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

std::string WorkerMetrics::PeerLabel(const std::string& peer) {
  const std::lock_guard lock(mutex_);
  if (peers_.contains(peer) || peers_.size() < kPeersMax) return *peers_.insert(peer).first;
  return "other";
}

void WorkerMetrics::OnKvReceived(const std::string& peer, Duration wire, Duration post, uint64_t bytes,
                                 uint32_t pieces) {
  if (metrics_ == nullptr) return;
  const MetricLabels labels = {{"peer", PeerLabel(peer)}};
  metrics_
      ->Histogram("millrace_kv_wire_seconds",
                  "From the first write of a prompt's KV to the last acknowledgement, as the prefill worker "
                  "(peer) says: most of it while the prompt is computed.",
                  kKvSeconds, labels)
      .Observe(Seconds(wire));
  metrics_
      ->Histogram("millrace_kv_post_seconds",
                  "From the first token until the prefill worker (peer) had submitted its last write.",
                  kKvSeconds, labels)
      .Observe(Seconds(post));
  metrics_
      ->Histogram("millrace_kv_bytes", "Bytes of a prompt's KV that came from a prefill worker (peer).",
                  kKvBytes, labels)
      .Observe(static_cast<double>(bytes));
  metrics_->Histogram("millrace_kv_pieces", "Pieces (a page of a layer) of it.", kKvPieces, labels)
      .Observe(pieces);
}

void WorkerMetrics::OnKvFailed(const std::string& peer) {
  if (metrics_ == nullptr) return;
  metrics_
      ->Counter("millrace_kv_failures_total", "Prompts whose prefill worker (peer) failed.",
                {{"peer", PeerLabel(peer)}})
      .Increment();
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
