#include "transfer/telemetry.h"

#include <algorithm>

namespace millrace::transfer {
namespace {

constexpr Duration kPeriod = std::chrono::milliseconds(500);

}  // namespace

TimePoint Telemetry::Update(TimePoint now, const std::function<Snapshot()>& look) {
  if (metrics_ == nullptr) return kNoDeadline;
  if (now >= next_) {
    Publish(look());
    next_ = now + kPeriod;
  }
  return next_;
}

void Telemetry::Count(const std::string& name, const std::string& help, const MetricLabels& labels,
                      uint64_t value) {
  prometheus::Counter& counter = metrics_->Counter(name, help, labels);
  counter.Increment(std::max(0.0, static_cast<double>(value) - counter.Value()));
}

void Telemetry::Publish(const Snapshot& snapshot) {
  const auto gauge = [this](const char* name, const char* help, double value) {
    metrics_->Gauge(name, help).Set(value);
  };
  gauge("millrace_transfer_open_tickets", "Tickets that peers may use, or that drain.",
        snapshot.open_tickets);
  gauge("millrace_transfer_draining_tickets", "Closed tickets whose memory a slice may still touch.",
        snapshot.draining_tickets);
  gauge("millrace_transfer_pending_requests", "Writes to and reads from peers that have not ended.",
        snapshot.pending_requests);
  gauge("millrace_transfer_peers", "Remote processes that are connected or being connected.", snapshot.peers);
  Count("millrace_transfer_bytes_received_total", "Payload bytes received.", {}, snapshot.bytes_received);
  Count("millrace_transfer_slices_refused_total", "Slices refused or with a wrong checksum.", {},
        snapshot.slices_refused);
  Count("millrace_transfer_slices_superseded_total", "Copies of slices that came after a later copy.", {},
        snapshot.slices_superseded);
  for (const PathSnapshot& path : snapshot.paths) PublishPath(path);
}

// A path is named by its rails, not by its peer: peers come and go, and each would leave its series behind.
void Telemetry::PublishPath(const PathSnapshot& path) {
  const MetricLabels labels = {{"kind", path.kind}, {"local", path.local_rail}, {"remote", path.remote_rail}};
  const auto gauge = [&](const char* name, const char* help, double value) {
    metrics_->Gauge(name, help, labels).Set(value);
  };
  gauge("millrace_transfer_path_up", "1 when the path carries slices.",
        path.state == "up" || path.state == "suspect" || path.state == "probation");
  gauge("millrace_transfer_path_bytes_per_second", "Measured over busy time.", path.bytes_per_second);
  gauge("millrace_transfer_path_delay_seconds", "Round trip of a path with nothing queued.",
        path.delay_seconds);
  gauge("millrace_transfer_path_bytes_in_flight", "Sent and not answered.",
        static_cast<double>(path.bytes_in_flight));
  Count("millrace_transfer_path_bytes_total", "Bytes of slices that landed.", labels, path.bytes_done);
  Count("millrace_transfer_path_slices_total", "Slices that landed.", labels, path.slices_done);
  Count("millrace_transfer_path_slices_resent_total", "Slices that came back and were sent on any path.",
        labels, path.slices_resent);
  Count("millrace_transfer_path_slices_hedged_total", "Late slices that were sent again elsewhere.", labels,
        path.slices_hedged);
  Count("millrace_transfer_path_trips_total", "Outages.", labels, path.trips);
}

}  // namespace millrace::transfer
