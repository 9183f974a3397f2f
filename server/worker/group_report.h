#pragma once
// What a worker that is one rank of an expert group says of the group: to its watchers and to Prometheus.

#include <vector>

#include "base/clock.h"
#include "base/metrics.h"
#include "engine/moe/expert_group.h"
#include "server/rpc/convert.h"

namespace millrace::server {

// Heartbeat thread.
class GroupReporter {
 public:
  // Both outlive this; metrics may be null.
  GroupReporter(const engine::ExpertGroup* group, Metrics* metrics) : group_(*group), metrics_(metrics) {}
  // The state now; what needs counting is counted at most once a second.
  const rpc::ExpertGroupState& Look(TimePoint now);

 private:
  void Count();

  const engine::ExpertGroup& group_;
  Metrics* const metrics_;
  TimePoint counted_;
  std::vector<uint64_t> before_;  // [layers, experts]
  rpc::ExpertGroupState state_;
};

}  // namespace millrace::server
