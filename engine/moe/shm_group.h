#pragma once
// Expert groups on one host: ranks are processes that see each other's rows in shared memory, without a copy
// and, while they keep up with each other, without a system call.

#include <memory>
#include <string>

#include "base/clock.h"
#include "engine/moe/expert_group.h"

namespace millrace::engine {

inline constexpr int32_t kShmRanksMax = 32;  // fit into one word beside the epoch

struct ShmGroupOptions {
  std::string directory;  // on tmpfs, common to the ranks; made if it is not there
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

// Joins the group, and returns once it has been complete: at once where this rank comes back to a group that
// serves. FailedPrecondition: such a rank runs already, or the ranks do not agree on the shape.
// DeadlineExceeded names who is missing. ResourceExhausted: no room in the directory.
StatusOr<std::unique_ptr<ExpertGroup>> JoinShmGroup(const ShmGroupOptions& options);

}  // namespace millrace::engine
