#include "server/router/worker_health.h"

namespace millrace::server {

WorkerHealth::WorkerHealth(const BreakerOptions& options, const Clock* clock, uint64_t seed)
    : options_(options), clock_(clock), random_(seed) {}

void WorkerHealth::Begin(const std::string& address) {
  std::lock_guard lock(mutex_);
  const auto found = entries_.find(address);
  if (found != entries_.end()) found->second.breaker.OnBegin(clock_->Now());
}

void WorkerHealth::Succeeded(const std::string& address) {
  std::lock_guard lock(mutex_);
  const auto found = entries_.find(address);
  if (found == entries_.end()) return;
  found->second.breaker.OnSuccess();
  if (found->second.breaker.clear()) entries_.erase(found);
}

void WorkerHealth::Failed(const std::string& address) {
  std::lock_guard lock(mutex_);
  const auto entry = entries_.try_emplace(address, Entry{Breaker(options_)}).first;
  entry->second.breaker.OnFailure(clock_->Now(), random_.Uniform());
}

void WorkerHealth::Neither(const std::string& address) {
  std::lock_guard lock(mutex_);
  const auto found = entries_.find(address);
  if (found != entries_.end()) found->second.breaker.OnNeither();
}

bool WorkerHealth::Allows(const std::string& address) const {
  std::lock_guard lock(mutex_);
  const auto found = entries_.find(address);
  return found == entries_.end() || found->second.breaker.Allows(clock_->Now());
}

std::vector<std::string> WorkerHealth::Avoided() const {
  std::lock_guard lock(mutex_);
  std::vector<std::string> avoided;
  for (const auto& [address, entry] : entries_) {
    if (!entry.breaker.Allows(clock_->Now())) avoided.push_back(address);
  }
  return avoided;
}

void WorkerHealth::Apply(std::vector<WorkerSnapshot>* workers) {
  std::lock_guard lock(mutex_);
  for (WorkerSnapshot& worker : *workers) {
    const auto found = entries_.find(worker.address);
    if (found == entries_.end()) continue;
    if (worker.epoch != 0 && found->second.epoch != 0 && worker.epoch != found->second.epoch) {
      entries_.erase(found);
      continue;
    }
    if (found->second.epoch == 0) found->second.epoch = worker.epoch;
    worker.avoid = !found->second.breaker.Allows(clock_->Now());
  }
}

}  // namespace millrace::server
