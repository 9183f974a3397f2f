#pragma once
// The engine's Prometheus metrics, copied from its snapshot now and then. Transfer thread only.

#include <functional>
#include <map>
#include <string>

#include "base/clock.h"
#include "base/metrics.h"
#include "transfer/transfer.h"

namespace millrace::transfer {

class Telemetry {
 public:
  explicit Telemetry(Metrics* metrics) : metrics_(metrics) {}  // may be null
  // Copies a snapshot when the last is old enough; says when it wants to be called again.
  TimePoint Update(TimePoint now, const std::function<Snapshot()>& look);

 private:
  void Publish(const Snapshot& snapshot);
  void PublishPath(const PathSnapshot& path);
  void Count(const std::string& name, const std::string& help, const MetricLabels& labels, uint64_t value);

  Metrics* const metrics_;
  TimePoint next_{};
};

}  // namespace millrace::transfer
