#pragma once
// Parallel work of a load, with progress.

#include <cstddef>
#include <functional>
#include <vector>

#include "engine/backend/cpu/cpu_backend.h"

namespace millrace::engine {

// Runs job(i, scratch) for i in [0, count) on options.num_threads threads; `scratch` belongs to the thread. A
// job returns the part of `total` that it did, for options.progress, which is called from the calling thread.
// The first error stops the rest and is returned.
using LoadJob = std::function<StatusOr<size_t>(size_t i, std::vector<float>* scratch)>;
Status RunParallel(size_t count, size_t total, const CpuWeightsOptions& options, const LoadJob& job);

}  // namespace millrace::engine
