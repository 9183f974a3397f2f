#pragma once
// The ranks of an expert group on this host, as children of one process.

#include <functional>

#include "base/status.h"
#include "server/cli/options.h"

namespace millrace::server {

// Runs serve(options of rank i) in a child process each, on a share of this process's processors (whole NUMA
// nodes where they go up), and starts again what ends by itself. Ends after SIGTERM or SIGINT, which it hands
// on, with the error of the first rank that did not end well. Call before this process has threads.
Status RunRanks(const WorkerCommandOptions& options,
                const std::function<Status(const WorkerCommandOptions& rank)>& serve);

}  // namespace millrace::server
