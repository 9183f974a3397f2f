#pragma once
// What one caller (a gateway of decode workers, a decode worker of prefill workers) has seen of the workers
// that it asked, and when it asks those that failed again.

#include <map>
#include <mutex>
#include <string>
#include <vector>

#include "base/random.h"
#include "server/router/breaker.h"
#include "server/router/router.h"

namespace millrace::server {

// Thread-safe. One breaker per address that has failed lately; an address without one is in good standing.
class WorkerHealth {
 public:
  // `clock` outlives it; `seed` is for jitter.
  explicit WorkerHealth(const BreakerOptions& options = {}, const Clock* clock = &Clock::System(),
                        uint64_t seed = RandomId());

  // The three moments of one request at one worker; Begin is followed by exactly one of the others.
  void Begin(const std::string& address);
  void Succeeded(const std::string& address);
  void Failed(const std::string& address);
  void Neither(const std::string& address);

  bool Allows(const std::string& address) const;
  std::vector<std::string> Avoided() const;  // sorted
  // Marks those that are to be avoided. A process that has restarted since it failed starts afresh.
  void Apply(std::vector<WorkerSnapshot>* workers);

 private:
  struct Entry {
    Breaker breaker;
    uint64_t epoch = 0;  // of the process that failed; 0 = not known
  };

  const BreakerOptions options_;
  const Clock* const clock_;
  mutable std::mutex mutex_;
  std::map<std::string, Entry> entries_;  // at most one per address that this process was told of
  Random random_;
};

}  // namespace millrace::server
