#pragma once
// What this gateway has given to whom, now, and what became of it. Snapshots of workers are up to 100 ms old:
// a burst that was routed by them alone would go to one worker.

#include <atomic>
#include <map>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "base/random.h"
#include "server/router/retry_budget.h"
#include "server/router/router.h"
#include "server/router/worker_health.h"

namespace millrace::server {

// Thread-safe. Outlives its leases and every generation.
class InFlight {
 public:
  // `clock` outlives it; `seed` is for jitter.
  explicit InFlight(const Clock* clock = &Clock::System(), uint64_t seed = RandomId())
      : clock_(clock), health_({}, clock, seed), random_(seed) {}

  // One request at one worker, for as long as the lease lives. Movable.
  class Lease {
   public:
    Lease() = default;
    Lease(Lease&& other) noexcept
        : owner_(std::exchange(other.owner_, nullptr)),
          address_(std::move(other.address_)),
          judged_(other.judged_) {}
    Lease& operator=(Lease&& other) noexcept;
    ~Lease() { Release(); }
    void Release();  // without a verdict, if there was none yet
    // The worker's good standing; the first of them counts.
    void Succeeded();
    void Failed();

   private:
    friend class InFlight;
    Lease(InFlight* owner, std::string address, bool judged)
        : owner_(owner), address_(std::move(address)), judged_(!judged) {}
    InFlight* owner_ = nullptr;
    std::string address_;
    bool judged_ = true;  // false: a request that says something about its worker, and has not yet
  };

  // `judged`: what becomes of the request counts for or against the worker.
  Lease Take(const std::string& address, bool judged);

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

  // How long a request that lost its worker waits before it goes to another one.
  Duration NextRetry();

  // Raises each worker's queue to what it must have from this gateway alone, and marks those in bad standing.
  void Apply(std::vector<WorkerSnapshot>* workers);

 private:
  const Clock* const clock_;
  mutable std::mutex mutex_;
  std::map<std::string, int32_t> counts_;  // never zero
  std::atomic<int32_t> generations_ = 0;
  WorkerHealth health_;
  RetryBudget retries_;  // under mutex_
  Random random_;        // under mutex_
};

}  // namespace millrace::server
