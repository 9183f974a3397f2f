#include "transfer/rdma/regions.h"

#include <algorithm>
#include <thread>

namespace millrace::transfer::rdma {

Regions::~Regions() {
  for (const auto& [id, region] : regions_) {
    for (size_t i = 0; i < devices_.size(); ++i) {
      if (region.by_device[i] != nullptr) devices_[i]->DeregisterMemory(region.by_device[i]);
    }
  }
}

Status Regions::Register(RegionId id, std::span<std::byte> memory, bool writable) {
  Populate(memory, writable, static_cast<int>(std::thread::hardware_concurrency()));
  Region region;
  region.by_device.resize(devices_.size());
  region.failures.resize(devices_.size());
  {
    std::vector<std::jthread> workers;
    for (size_t i = 0; i < devices_.size(); ++i) {
      workers.emplace_back([&, i] {
        auto mr = devices_[i]->RegisterMemory(memory, writable);
        if (mr.ok()) {
          region.by_device[i] = *mr;
        } else {
          region.failures[i] = mr.status();
        }
      });
    }
  }
  Status first;
  for (const Status& failure : region.failures) {
    if (first.ok()) first = failure;
  }
  const std::lock_guard lock(mutex_);
  regions_.emplace(id, std::move(region));
  return first;
}

void Regions::Deregister(RegionId id) {
  Region region;
  {
    const std::lock_guard lock(mutex_);
    const auto found = regions_.find(id);
    if (found == regions_.end()) return;
    region = std::move(found->second);
    regions_.erase(found);
  }
  for (size_t i = 0; i < devices_.size(); ++i) {
    if (region.by_device[i] != nullptr) devices_[i]->DeregisterMemory(region.by_device[i]);
  }
}

StatusOr<Regions::Keys> Regions::Find(size_t device, RegionId id) const {
  const std::lock_guard lock(mutex_);
  const auto found = regions_.find(id);
  if (found == regions_.end() || found->second.by_device[device] == nullptr)
    return NotFound("region {} is not registered with RDMA device {}", id, devices_[device]->name());
  const ibv_mr* const mr = found->second.by_device[device];
  return Keys{mr->lkey, mr->rkey};
}

Status Regions::Usable(size_t device) const {
  const std::lock_guard lock(mutex_);
  if (!lost_[device].ok()) return lost_[device];
  for (const auto& [id, region] : regions_) {
    if (!region.failures[device].ok()) return region.failures[device];
  }
  return OkStatus();
}

void Regions::Disable(size_t device, const Status& why) {
  const std::lock_guard lock(mutex_);
  lost_[device] = why;
}

}  // namespace millrace::transfer::rdma
