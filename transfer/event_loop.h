#pragma once
// The transfer thread's loop: descriptors, posted work and a tick. One thread runs it; Post may be called
// from any.

#include <functional>
#include <memory>
#include <mutex>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/functional/any_invocable.h"
#include "base/clock.h"
#include "base/file.h"
#include "base/status.h"

namespace millrace::transfer {

class EventLoop {
 public:
  using Work = absl::AnyInvocable<void() &&>;
  using Handler = std::function<void(uint32_t events)>;  // epoll's bits

  static StatusOr<std::unique_ptr<EventLoop>> Create();

  // Loop thread only. A handler may remove itself or others; it is not called after Remove.
  void Add(int fd, uint32_t events, Handler handler);
  void Change(int fd, uint32_t events);
  void Remove(int fd);

  void Post(Work work);  // any thread; runs in order on the loop thread
  void Stop();           // any thread; Run returns after what was posted before

  // `tick` runs after each round of events and says when it wants to run again at the latest (kNoDeadline:
  // never).
  void Run(const std::function<TimePoint()>& tick);
  void RunRemaining();  // what is still posted, and what that posts; after Run

 private:
  EventLoop(UniqueFd epoll, UniqueFd wake) : epoll_(std::move(epoll)), wake_(std::move(wake)) {}
  bool RunPosted();

  const UniqueFd epoll_;
  const UniqueFd wake_;  // eventfd
  absl::flat_hash_map<int, std::shared_ptr<Handler>>
      handlers_;  // shared: a running handler may remove itself
  std::mutex mutex_;
  std::vector<Work> posted_;
  bool stopping_ = false;
};

}  // namespace millrace::transfer
