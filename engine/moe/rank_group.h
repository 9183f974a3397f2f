#pragma once
// The protocol by which the ranks of a group go through passes together, over any fabric.

#include <memory>
#include <vector>

#include "base/clock.h"
#include "engine/moe/expert_group.h"
#include "engine/moe/group_fabric.h"

namespace millrace::engine {

struct RankGroupOptions {
  int32_t rank = 0;
  GroupShape shape;
  // What this rank holds at the start; [layers] of [experts], its own bit counts.
  std::vector<LayerPlacement> held;
  // A rank is cast out when its process is gone (noticed within milliseconds), when it has not run at all for
  // heartbeat_max, or when the others have waited for its part of a pass for stall_max.
  Duration heartbeat_max = std::chrono::seconds(2);
  Duration stall_max = std::chrono::seconds(20);
  // How long the first ones wait for the last one at the start.
  Duration form_max = std::chrono::minutes(30);
};

// InvalidArgument: no such rank, or more ranks than a group or its experts allow.
Status CheckRank(const RankGroupOptions& options);

// Joins the group, and returns once it has been complete: at once where this rank comes back to a group that
// serves. DeadlineExceeded names who is missing; and what the fabric's Enter and Formed say.
StatusOr<std::unique_ptr<ExpertGroup>> JoinGroup(const RankGroupOptions& options,
                                                 std::unique_ptr<GroupFabric> fabric);

}  // namespace millrace::engine
