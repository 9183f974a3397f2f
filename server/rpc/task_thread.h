#pragma once
// A thread that runs tasks.

#include <condition_variable>
#include <deque>
#include <map>
#include <mutex>
#include <string>
#include <thread>

#include "server/rpc/task_runner.h"

namespace millrace::server {

// All methods: any thread. A timer that Stop finds is dropped.
class TaskThread final : public TaskRunner {
 public:
  explicit TaskThread(std::string name);
  ~TaskThread() override;  // Stop

  TimePoint Now() const override { return std::chrono::steady_clock::now(); }
  void Post(Task task) override;
  TimerId PostAt(TimePoint when, Task task) override;
  void CancelTimer(const TimerId& timer) override;
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
