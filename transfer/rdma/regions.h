#pragma once
// Registered memory on every RDMA device of this process. Any thread.
//
// A path must be able to carry every slice, so a device that could not register a region is out of service,
// with the reason, for as long as that region is there.

#include <mutex>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "transfer/rdma/device.h"
#include "transfer/transfer.h"

namespace millrace::transfer::rdma {

class Regions {
 public:
  explicit Regions(std::vector<Device*> devices) : devices_(std::move(devices)), lost_(devices_.size()) {}
  ~Regions();

  // With all devices at once, after the pages were touched in parallel. The first failure, which names the
  // device and the cause; the others are registered all the same.
  Status Register(RegionId region, std::span<std::byte> memory, bool writable);
  void Deregister(RegionId region);

  struct Keys {
    uint32_t local = 0;
    uint32_t remote = 0;
  };
  // NotFound when the region is not registered with that device.
  StatusOr<Keys> Find(size_t device, RegionId region) const;
  // OK, or why the device is out of service.
  Status Usable(size_t device) const;
  void Disable(size_t device, const Status& why);  // for good: the device was lost

 private:
  struct Region {
    std::vector<ibv_mr*> by_device;  // null: failed
    std::vector<Status> failures;    // by device
  };
  const std::vector<Device*> devices_;
  mutable std::mutex mutex_;
  std::vector<Status> lost_;  // by device
  absl::flat_hash_map<RegionId, Region> regions_;
};

}  // namespace millrace::transfer::rdma
