#pragma once
// Bounded multi-producer multi-consumer queue: where threads meet. Full and closed are answers, not waits.

#include <condition_variable>
#include <cstddef>
#include <deque>
#include <mutex>
#include <optional>
#include <utility>

#include "base/check.h"
#include "base/clock.h"

namespace millrace {

template <typename T>
class BoundedQueue {
 public:
  explicit BoundedQueue(size_t size_max) : size_max_(size_max) { MR_CHECK(size_max > 0); }

  // False when the queue is full or closed; `value` is then untouched. Never waits.
  bool TryPush(T&& value) {
    {
      std::lock_guard lock(mutex_);
      if (closed_ || values_.size() >= size_max_) return false;
      values_.push_back(std::move(value));
    }
    not_empty_.notify_one();
    return true;
  }

  std::optional<T> TryPop() {
    std::lock_guard lock(mutex_);
    return PopLocked();
  }

  // Waits until a value is there, `deadline` passes, or the queue is closed and empty; nullopt in the last
  // two cases.
  std::optional<T> Pop(TimePoint deadline = kNoDeadline) {
    std::unique_lock lock(mutex_);
    const auto ready = [this] { return closed_ || !values_.empty(); };
    if (deadline == kNoDeadline) {
      not_empty_.wait(lock, ready);
    } else {
      not_empty_.wait_until(lock, deadline, ready);
    }
    return PopLocked();
  }

  // No further push succeeds; what is queued can still be popped. Wakes all waiters.
  void Close() {
    {
      std::lock_guard lock(mutex_);
      closed_ = true;
    }
    not_empty_.notify_all();
  }

  size_t size() const {
    std::lock_guard lock(mutex_);
    return values_.size();
  }

 private:
  std::optional<T> PopLocked() {
    if (values_.empty()) return std::nullopt;
    std::optional<T> value(std::move(values_.front()));
    values_.pop_front();
    return value;
  }

  const size_t size_max_;
  mutable std::mutex mutex_;
  std::condition_variable not_empty_;
  std::deque<T> values_;
  bool closed_ = false;
};

}  // namespace millrace
