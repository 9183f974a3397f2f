#include "engine/backend/cpu/load_jobs.h"

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <mutex>
#include <thread>

#include "base/cpu.h"

namespace millrace::engine {

Status RunParallel(size_t count, size_t total, const CpuWeightsOptions& options, const LoadJob& job) {
  std::atomic<size_t> next{0};
  std::mutex mutex;
  std::condition_variable finished;
  size_t done = 0;  // under `mutex`, as the two below
  size_t working = 0;
  Status failure;
  const auto work = [&] {
    std::vector<float> scratch;
    for (size_t i = next++; i < count; i = next++) {
      StatusOr<size_t> part = job(i, &scratch);
      const std::lock_guard lock(mutex);
      if (part.ok()) {
        done += *part;
      } else {
        if (failure.ok()) failure = std::move(part).status();
        next = count;
      }
    }
    const std::lock_guard lock(mutex);
    --working;
    finished.notify_one();
  };
  const auto threads = static_cast<size_t>(options.num_threads > 0 ? options.num_threads : UsableCpuCount());
  working = std::min(threads, std::max<size_t>(count, 1));
  std::vector<std::jthread> helpers;
  for (size_t i = working; i > 0; --i) helpers.emplace_back(work);
  std::unique_lock lock(mutex);
  while (!finished.wait_for(lock, std::chrono::milliseconds(50), [&] { return working == 0; })) {
    if (!options.progress) continue;
    const size_t so_far = std::min(done, total == 0 ? 0 : total - 1);
    lock.unlock();
    options.progress(so_far, total);
    lock.lock();
  }
  if (failure.ok() && options.progress) options.progress(total, total);
  return failure;
}

}  // namespace millrace::engine
