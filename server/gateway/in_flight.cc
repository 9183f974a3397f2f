#include "server/gateway/in_flight.h"

namespace millrace::server {

InFlight::Lease& InFlight::Lease::operator=(Lease&& other) noexcept {
  if (this != &other) {
    Release();
    owner_ = std::exchange(other.owner_, nullptr);
    address_ = std::move(other.address_);
    judged_ = other.judged_;
  }
  return *this;
}

void InFlight::Lease::Release() {
  if (owner_ == nullptr) return;
  if (!std::exchange(judged_, true)) owner_->health_.Neither(address_);
  std::lock_guard lock(owner_->mutex_);
  const auto found = owner_->counts_.find(address_);
  if (--found->second == 0) owner_->counts_.erase(found);
  owner_ = nullptr;
}

void InFlight::Lease::Succeeded() {
  if (owner_ != nullptr && !std::exchange(judged_, true)) owner_->health_.Succeeded(address_);
}

void InFlight::Lease::Failed() {
  if (owner_ != nullptr && !std::exchange(judged_, true)) owner_->health_.Failed(address_);
}

InFlight::Lease InFlight::Take(const std::string& address, bool judged) {
  if (judged) health_.Begin(address);
  std::lock_guard lock(mutex_);
  if (judged) retries_.OnRequest();
  ++counts_[address];
  return Lease(this, address, judged);
}

Duration InFlight::NextRetry() {
  constexpr Duration kSpread = std::chrono::milliseconds(20);
  std::lock_guard lock(mutex_);
  const Duration wait = retries_.Take(clock_->Now());
  if (wait == Duration(0)) return wait;
  return wait + Duration(static_cast<int64_t>(random_.Uniform() * static_cast<double>(kSpread.count())));
}

void InFlight::Apply(std::vector<WorkerSnapshot>* workers) {
  health_.Apply(workers);
  std::lock_guard lock(mutex_);
  for (WorkerSnapshot& worker : *workers) {
    const auto found = counts_.find(worker.address);
    if (found == counts_.end()) continue;
    const int32_t reported = worker.waiting + worker.running;
    if (found->second > reported) worker.waiting += found->second - reported;
  }
}

}  // namespace millrace::server
