#pragma once
// What this gateway has given to whom, now. Snapshots of workers are up to 100 ms old: a burst that was
// routed by them alone would go to one worker.

#include <atomic>
#include <map>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "server/router/router.h"

namespace millrace::server {

// Thread-safe. Outlives its leases and every generation.
class InFlight {
 public:
  // One request at one worker, for as long as the lease lives. Movable.
  class Lease {
   public:
    Lease() = default;
    Lease(Lease&& other) noexcept
        : owner_(std::exchange(other.owner_, nullptr)), address_(std::move(other.address_)) {}
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

  // One generation, from its construction to its end: gRPC may call it until then, and it posts to the
  // gateway's threads.
  class Presence {
   public:
    explicit Presence(InFlight& owner) : owner_(owner) { ++owner_.generations_; }
    ~Presence() { --owner_.generations_; }
    Presence(const Presence&) = delete;
    Presence& operator=(const Presence&) = delete;

   private:
    InFlight& owner_;
  };
  int32_t generations() const { return generations_; }

  // Raises each worker's queue to what it must have from this gateway alone.
  void Apply(std::vector<WorkerSnapshot>* workers) const;

 private:
  mutable std::mutex mutex_;
  std::map<std::string, int32_t> counts_;  // never zero
  std::atomic<int32_t> generations_ = 0;
};

}  // namespace millrace::server
