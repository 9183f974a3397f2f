#include "transfer/telemetry.h"

#include <algorithm>

namespace millrace::transfer {
namespace {

constexpr Duration kPeriod = std::chrono::milliseconds(500);

struct PathCounter {
  const char* name;
  const char* help;
  uint64_t PathSnapshot::*value;
};
constexpr PathCounter kPathCounters[] = {
    {"millrace_transfer_path_bytes_total", "Bytes of slices that landed.", &PathSnapshot::bytes_done},
    {"millrace_transfer_path_slices_total", "Slices that landed.", &PathSnapshot::slices_done},
    {"millrace_transfer_path_slices_resent_total", "Slices that came back and were sent on any path.",
     &PathSnapshot::slices_resent},
    {"millrace_transfer_path_slices_hedged_total", "Late slices that were sent again elsewhere.",
     &PathSnapshot::slices_hedged},
    {"millrace_transfer_path_trips_total", "Outages.", &PathSnapshot::trips}};

// What stands of all paths that join the same rails.
struct PathGauges {
  double up = 0, bytes_per_second = 0, delay_seconds = 0, bytes_in_flight = 0;

  void Add(const PathSnapshot& path) {
    if (path.state == "up" || path.state == "suspect" || path.state == "probation") up = 1;
    bytes_per_second += path.bytes_per_second;
    delay_seconds = std::max(delay_seconds, path.delay_seconds);
    bytes_in_flight += static_cast<double>(path.bytes_in_flight);
  }
};
struct PathGauge {
  const char* name;
  const char* help;
  double PathGauges::*value;
};
constexpr PathGauge kPathGauges[] = {
    {"millrace_transfer_path_up", "1 when the path carries slices.", &PathGauges::up},
    {"millrace_transfer_path_bytes_per_second", "Measured over busy time.", &PathGauges::bytes_per_second},
    {"millrace_transfer_path_delay_seconds", "Round trip of a path with nothing queued.",
     &PathGauges::delay_seconds},
    {"millrace_transfer_path_bytes_in_flight", "Sent and not answered.", &PathGauges::bytes_in_flight}};

}  // namespace

TimePoint Telemetry::Update(TimePoint now, const std::function<Snapshot()>& look) {
  if (metrics_ == nullptr) return kNoDeadline;
  if (now >= next_) {
    Publish(look());
    next_ = now + kPeriod;
  }
  return next_;
}

void Telemetry::Count(const std::string& name, const std::string& help, uint64_t value) {
  prometheus::Counter& counter = metrics_->Counter(name, help);
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
  Count("millrace_transfer_bytes_received_total", "Payload bytes received.", snapshot.bytes_received);
  Count("millrace_transfer_slices_refused_total", "Slices refused or with a wrong checksum.",
        snapshot.slices_refused);
  Count("millrace_transfer_slices_superseded_total", "Copies of slices that came after a later copy.",
        snapshot.slices_superseded);
  PublishPaths(snapshot);
}

void Telemetry::PublishPaths(const Snapshot& snapshot) {
  std::map<MetricLabels, PathGauges> gauges;
  std::map<PathKey, PathCounts> counted;
  std::map<PeerId, size_t> paths_of_peer;
  for (const PathSnapshot& path : snapshot.paths) {
    const MetricLabels labels = {
        {"kind", path.kind}, {"local", path.local_rail}, {"remote", path.remote_rail}};
    gauges[labels].Add(path);
    const PathKey key{path.peer, paths_of_peer[path.peer]++};
    const PathCounts before = counted_[key];
    PathCounts& now = counted[key];
    for (size_t i = 0; i < now.size(); ++i) {
      now[i] = path.*kPathCounters[i].value;
      metrics_->Counter(kPathCounters[i].name, kPathCounters[i].help, labels)
          .Increment(static_cast<double>(now[i] - before[i]));
    }
  }
  counted_ = std::move(counted);
  for (const auto& [labels, values] : gauges) {
    for (const PathGauge& gauge : kPathGauges)
      metrics_->Gauge(gauge.name, gauge.help, labels).Set(values.*gauge.value);
    shown_.insert(labels);
  }
  std::erase_if(shown_, [&](const MetricLabels& labels) {
    if (gauges.contains(labels)) return false;
    for (const PathGauge& gauge : kPathGauges) metrics_->RemoveGauge(gauge.name, labels);
    return true;
  });
}

}  // namespace millrace::transfer
