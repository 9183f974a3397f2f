#pragma once
// What one worker counts. Every method does nothing when there is no registry.

#include <array>
#include <atomic>

#include "base/clock.h"
#include "base/metrics.h"
#include "base/status.h"
#include "server/worker/ticket.h"

namespace millrace::server {

// Thread-safe.
class WorkerMetrics final : public TicketObserver {
 public:
  explicit WorkerMetrics(Metrics* metrics);

  void OnRequest(const char* kind, const Status& outcome);  // kind: "generate" or "prefill"
  void OnPrefillAttempt(const char* outcome);               // committed, failed, cancelled
  void OnTransferred(uint64_t bytes);                       // acknowledged by the receiver
  void OnPhase(const char* phase, Duration took);           // queue, prefill, transfer

  void OnBegin(TicketState state) override;
  void OnMove(TicketState from, TicketState to) override;
  int open_tickets() const { return open_tickets_; }  // not yet released

 private:
  Metrics* const metrics_;
  std::array<prometheus::Gauge*, kTicketStates> tickets_{};  // the last state is not shown
  prometheus::Counter* bytes_ = nullptr;
  std::atomic<int> open_tickets_ = 0;
};

}  // namespace millrace::server
