#include "server/rpc/task_thread.h"

#include "base/check.h"
#include "base/thread.h"

namespace millrace::server {

TaskThread::TaskThread(std::string name) : name_(std::move(name)), thread_([this] { Run(); }) {}

TaskThread::~TaskThread() { Stop(); }

// Notifies under the lock: the poster's last touch is then the unlock, so a task may lead to this object's
// end.
void TaskThread::Post(Task task) {
  std::lock_guard lock(mutex_);
  tasks_.push_back(std::move(task));
  changed_.notify_one();
}

TaskThread::TimerId TaskThread::PostAt(TimePoint when, Task task) {
  std::lock_guard lock(mutex_);
  const TimerId id{when, next_number_++};
  timers_.emplace(id, std::move(task));
  changed_.notify_one();
  return id;
}

void TaskThread::CancelTimer(const TimerId& timer) {
  Task dropped;  // destroyed outside the lock: what it holds may post
  {
    std::lock_guard lock(mutex_);
    const auto found = timers_.find(timer);
    if (found == timers_.end()) return;
    dropped = std::move(found->second);
    timers_.erase(found);
  }
}

void TaskThread::Stop() {
  MR_CHECK(!IsCurrent(), "a task thread cannot stop itself");
  {
    std::lock_guard lock(mutex_);
    stopping_ = true;
    changed_.notify_one();
  }
  if (thread_.joinable()) thread_.join();
  std::map<TimerId, Task> dropped;
  {
    std::lock_guard lock(mutex_);
    dropped.swap(timers_);
  }
}

void TaskThread::Run() {
  SetThreadName(name_);
  std::unique_lock lock(mutex_);
  while (true) {
    Task task;
    if (!timers_.empty() && timers_.begin()->first.when <= std::chrono::steady_clock::now()) {
      task = std::move(timers_.begin()->second);
      timers_.erase(timers_.begin());
    } else if (!tasks_.empty()) {
      task = std::move(tasks_.front());
      tasks_.pop_front();
    } else if (stopping_) {
      return;
    } else if (timers_.empty()) {
      changed_.wait(lock);
      continue;
    } else {
      const TimePoint when = timers_.begin()->first.when;
      changed_.wait_until(lock, when);
      continue;
    }
    lock.unlock();
    std::move(task)();
    task = nullptr;  // what it held goes without the lock
    lock.lock();
  }
}

}  // namespace millrace::server
