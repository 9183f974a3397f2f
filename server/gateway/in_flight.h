#pragma once
// What this gateway has given to whom, now. Snapshots of workers are up to 100 ms old: a burst that was routed by them
// alone would go to one worker.

#include <map>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "server/router/router.h"

namespace millrace::server {

// Thread-safe. Outlives its leases.
class InFlight {
 public:
  // One request at one worker, for as long as the lease lives. Movable.
  class Lease {
   public:
    Lease() = default;
    Lease(Lease&& other) noexcept : owner_(std::exchange(other.owner_, nullptr)), address_(std::move(other.address_)) {}
    Lease& operator=(Lease&& other) noexcept;
    ~Lease() { Release(); }
    void Release();

   private:
    friend class InFlight;
    Lease(InFlight* owner, std::string address) : owner_(owner), address_(std::move(address)) {}
    InFlight* owner_ = nullptr;
    std::string address_;
  };

  Lease Take(const std::string& address);

  // Raises each worker's queue to what it must have from this gateway alone.
  void Apply(std::vector<WorkerSnapshot>* workers) const;

 private:
  mutable std::mutex mutex_;
  std::map<std::string, int32_t> counts_;  // never zero
};

}  // namespace millrace::server
