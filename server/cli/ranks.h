#pragma once
// The ranks of an expert group: on this host, as children of one process, or on several.

#include <functional>
#include <vector>

#include "base/net.h"
#include "base/status.h"
#include "server/cli/options.h"

namespace millrace::server {

// Runs serve(options of rank i) in a child process each, on a share of this process's processors (whole NUMA
// nodes where they go up), and starts again what ends by itself. Ends after SIGTERM or SIGINT, which it hands
// on, with the error of the first rank that did not end well. Call before this process has threads.
Status RunRanks(const WorkerCommandOptions& options,
                const std::function<Status(const WorkerCommandOptions& rank)>& serve);

// Where the ranks of a group over several hosts dial each other, from --group-peers. InvalidArgument names
// the address, or says which options do not go together.
StatusOr<std::vector<HostPort>> GroupPeers(const GroupOptions& options);

}  // namespace millrace::server
