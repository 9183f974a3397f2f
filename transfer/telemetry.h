#pragma once
// The engine's Prometheus metrics, copied from its snapshot now and then. Transfer thread only.

#include <array>
#include <functional>
#include <map>
#include <set>
#include <string>
#include <utility>

#include "base/clock.h"
#include "base/metrics.h"
#include "transfer/transfer.h"

namespace millrace::transfer {

// A path is named by its rails, not by its peer: peers come and go, and each would leave its series behind.
// Paths that join the same rails (a restarted process beside its old self, several connections) share series:
// counters add up what each has moved and never fall; gauges are of those that exist now, and go with the
// last of them.
class Telemetry {
 public:
  explicit Telemetry(Metrics* metrics) : metrics_(metrics) {}  // may be null
  // Copies a snapshot when the last is old enough; says when it wants to be called again.
  TimePoint Update(TimePoint now, const std::function<Snapshot()>& look);

 private:
  using PathKey = std::pair<PeerId, size_t>;  // a peer's paths keep their order
  using PathCounts = std::array<uint64_t, 5>;

  void Publish(const Snapshot& snapshot);
  void PublishPaths(const Snapshot& snapshot);
  void Count(const std::string& name, const std::string& help, uint64_t value);

  Metrics* const metrics_;
  TimePoint next_{};
  std::map<PathKey, PathCounts> counted_;  // of each path, so far
  std::set<MetricLabels> shown_;           // paths whose gauges stand
};

}  // namespace millrace::transfer
