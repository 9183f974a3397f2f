#pragma once
// How many requests the workers get at once from this gateway, and who is next: a bounded queue that is
// shared fairly between API keys.

#include <cstdint>
#include <functional>
#include <list>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "base/clock.h"
#include "base/status.h"

namespace millrace::server {

struct AdmissionOptions {
  int32_t running_max = 1024;  // choices at the workers at once, over all keys
  int32_t queue_max = 1024;    // requests that wait
  const Clock* clock = &Clock::System();
};

// Fairness: each key has a meter that runs by the tokens it was served (prompt when it starts, answer when it
// ends); the waiting request of the key whose meter is lowest goes next. A key that comes back from idling
// starts at the lowest meter in use: it gets its share from now on, not what it did not ask for before.
// Within a key the higher priority goes first, then the earlier arrival.
//
// When the queue is full, the newest request of the key that has most waiting makes room for a key that has
// less; otherwise the newcomer is refused.
//
// Thread-safe. Outlives its tickets.
class Admission {
 public:
  // OK once: the request may run. ResourceExhausted: it was refused, or had to make room. Called at most
  // once, on any thread, also from within Enter; it only posts.
  using Decision = std::function<void(const Status&)>;

  // One request, queued or running, until it is destroyed. Movable.
  class Ticket {
   public:
    Ticket() = default;
    Ticket(Ticket&& other) noexcept : owner_(std::exchange(other.owner_, nullptr)), id_(other.id_) {}
    Ticket& operator=(Ticket&& other) noexcept;
    ~Ticket() { Leave(0); }
    // The request has ended, after `tokens` of answer.
    void Leave(int64_t tokens);

   private:
    friend class Admission;
    Ticket(Admission* owner, uint64_t id) : owner_(owner), id_(id) {}
    Admission* owner_ = nullptr;
    uint64_t id_ = 0;
  };

  explicit Admission(const AdmissionOptions& options) : options_(options) {}

  struct Request {
    std::string key;  // name of the API key; "" for all who have none
    int32_t priority = 0;
    int32_t choices = 1;
    int64_t prompt_tokens = 0;
  };
  Ticket Enter(const Request& request, Decision decision);

  // Seconds until a newcomer would find room, from the rate at which requests have ended of late: 1 to 60.
  int32_t RetryAfterSeconds() const;
  struct Counts {
    int32_t waiting = 0;
    int32_t running = 0;  // choices
  };
  Counts counts() const;

 private:
  struct Entry {
    Request request;
    Decision decision;
    uint64_t arrival = 0;
    bool running = false;
  };
  struct Key {
    double meter = 0;
    std::list<uint64_t> waiting;  // in order of service
    int32_t active = 0;           // requests that wait or run
  };
  using Decisions = std::vector<std::pair<Decision, Status>>;

  Status Full() const;
  void Queue(uint64_t id, Entry* entry);
  bool MakeRoom(const std::string& newcomer, Decisions* decisions);
  void StartWhoFits(Decisions* decisions);
  void Remove(uint64_t id, int64_t tokens, Decisions* decisions);
  void NoteEnd();

  const AdmissionOptions options_;
  mutable std::mutex mutex_;
  std::map<uint64_t, Entry> entries_;
  std::map<std::string, Key> keys_;  // those with active requests, and a bounded number of others
  int32_t waiting_ = 0;
  int32_t running_ = 0;
  uint64_t next_id_ = 0;
  double seconds_per_end_ = 0;  // smoothed; 0 = nothing ended yet
  TimePoint last_end_;
};

}  // namespace millrace::server
