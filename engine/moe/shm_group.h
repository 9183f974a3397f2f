#pragma once
// Expert groups on one host: ranks are processes that see each other's rows in shared memory, without a copy
// and, while they keep up with each other, without a system call.

#include <memory>
#include <string>

#include "engine/moe/rank_group.h"

namespace millrace::engine {

// `directory`: on tmpfs, common to the ranks; made if it is not there. Beyond what JoinGroup says:
// FailedPrecondition: such a rank runs already, or the ranks do not agree on the shape. ResourceExhausted: no
// room in the directory.
StatusOr<std::unique_ptr<ExpertGroup>> JoinShmGroup(const RankGroupOptions& options,
                                                    const std::string& directory);

}  // namespace millrace::engine
