#pragma once
// What one worker counts. Every method does nothing when there is no registry.

#include <array>
#include <atomic>
#include <mutex>
#include <set>
#include <string>

#include "base/clock.h"
#include "base/metrics.h"
#include "base/status.h"
#include "server/worker/ticket.h"

namespace millrace::server {

// The tickets of one direction, as queues. Thread-safe.
class TicketQueues final : public TicketObserver {
 public:
  // `all` counts them by state. Without a registry (null) there are no queues.
  TicketQueues(TicketObserver& all, Metrics* metrics, const char* waiting, const char* moving);
  void OnBegin(TicketState state) override;
  void OnMove(TicketState from, TicketState to) override;

 private:
  prometheus::Gauge* QueueOf(TicketState state) const;

  TicketObserver& all_;
  prometheus::Gauge* waiting_ = nullptr;
  prometheus::Gauge* moving_ = nullptr;
};

// Thread-safe.
class WorkerMetrics final : public TicketObserver {
 public:
  explicit WorkerMetrics(Metrics* metrics);

  void OnRequest(const char* kind, const Status& outcome);  // kind: "generate" or "prefill"
  void OnPrefillAttempt(const char* outcome);               // committed, failed, cancelled
  void OnTransferred(uint64_t bytes);                       // acknowledged by the receiver
  void OnPhase(const char* phase, Duration took);           // queue, prefill, transfer
  // One prompt's KV has come from the prefill worker at `peer`; or that worker failed.
  void OnKvReceived(const std::string& peer, Duration wire, Duration post, uint64_t bytes, uint32_t pieces);
  void OnKvFailed(const std::string& peer);

  void OnBegin(TicketState state) override;
  void OnMove(TicketState from, TicketState to) override;
  int open_tickets() const { return open_tickets_; }  // not yet released
  TicketObserver& imports() { return imports_; }      // of D's tickets
  TicketObserver& exports() { return exports_; }      // of P's

 private:
  std::string PeerLabel(const std::string& peer);

  Metrics* const metrics_;
  std::array<prometheus::Gauge*, kTicketStates> tickets_{};  // the last state is not shown
  prometheus::Counter* bytes_ = nullptr;
  std::atomic<int> open_tickets_ = 0;
  TicketQueues imports_;
  TicketQueues exports_;
  std::mutex mutex_;
  std::set<std::string> peers_;  // that have series of their own
};

}  // namespace millrace::server
