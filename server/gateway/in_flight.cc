#include "server/gateway/in_flight.h"

namespace millrace::server {

InFlight::Lease& InFlight::Lease::operator=(Lease&& other) noexcept {
  if (this != &other) {
    Release();
    owner_ = std::exchange(other.owner_, nullptr);
    address_ = std::move(other.address_);
  }
  return *this;
}

void InFlight::Lease::Release() {
  if (owner_ == nullptr) return;
  std::lock_guard lock(owner_->mutex_);
  const auto found = owner_->counts_.find(address_);
  if (--found->second == 0) owner_->counts_.erase(found);
  owner_ = nullptr;
}

InFlight::Lease InFlight::Take(const std::string& address) {
  std::lock_guard lock(mutex_);
  ++counts_[address];
  return Lease(this, address);
}

void InFlight::Apply(std::vector<WorkerSnapshot>* workers) const {
  std::lock_guard lock(mutex_);
  for (WorkerSnapshot& worker : *workers) {
    const auto found = counts_.find(worker.address);
    if (found == counts_.end()) continue;
    const int32_t reported = worker.waiting + worker.running;
    if (found->second > reported) worker.waiting += found->second - reported;
  }
}

}  // namespace millrace::server
