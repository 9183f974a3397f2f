#pragma once
// A thread that runs tasks one after another, and tasks at a time. What only such a thread touches needs no
// lock.

#include <condition_variable>
#include <deque>
#include <map>
#include <mutex>
#include <string>
#include <thread>
#include <utility>

#include "absl/functional/any_invocable.h"
#include "base/clock.h"

namespace millrace::server {

// All methods: any thread. The queue has no bound of its own; each user states what bounds its tasks.
class TaskThread {
 public:
  using Task = absl::AnyInvocable<void() &&>;
  struct TimerId {
    TimePoint when;
    uint64_t number = 0;
    auto operator<=>(const TimerId&) const = default;
  };

  explicit TaskThread(std::string name);
  ~TaskThread();  // Stop

  void Post(Task task);  // tasks of one poster run in order
  // Runs `task` at `when` or soon after. A timer that Stop finds is dropped.
  TimerId PostAt(TimePoint when, Task task);
  void CancelTimer(const TimerId& timer);  // nothing when it ran already
  bool IsCurrent() const { return std::this_thread::get_id() == thread_.get_id(); }
  // Runs what is queued, drops timers, joins. Not from a task.
  void Stop();

 private:
  void Run();

  const std::string name_;
  std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<Task> tasks_;
  std::map<TimerId, Task> timers_;
  uint64_t next_number_ = 0;
  bool stopping_ = false;
  std::thread thread_;
};

}  // namespace millrace::server
