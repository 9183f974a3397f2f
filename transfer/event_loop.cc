#include "transfer/event_loop.h"

#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include <algorithm>
#include <array>

#include "base/check.h"

namespace millrace::transfer {

StatusOr<std::unique_ptr<EventLoop>> EventLoop::Create() {
  UniqueFd epoll(epoll_create1(EPOLL_CLOEXEC));
  UniqueFd wake(eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK));
  if (!epoll.valid() || !wake.valid())
    return ResourceExhausted("no descriptor for the transfer engine's event loop");
  epoll_event event{};
  event.events = EPOLLIN;
  event.data.fd = wake.get();
  MR_CHECK(epoll_ctl(epoll.get(), EPOLL_CTL_ADD, wake.get(), &event) == 0);
  return std::unique_ptr<EventLoop>(new EventLoop(std::move(epoll), std::move(wake)));
}

void EventLoop::Add(int fd, uint32_t events, Handler handler) {
  handlers_[fd] = std::make_shared<Handler>(std::move(handler));
  epoll_event event{};
  event.events = events;
  event.data.fd = fd;
  MR_CHECK(epoll_ctl(epoll_.get(), EPOLL_CTL_ADD, fd, &event) == 0, "epoll_ctl add");
}

void EventLoop::Change(int fd, uint32_t events) {
  epoll_event event{};
  event.events = events;
  event.data.fd = fd;
  MR_CHECK(epoll_ctl(epoll_.get(), EPOLL_CTL_MOD, fd, &event) == 0, "epoll_ctl mod");
}

void EventLoop::Remove(int fd) {
  epoll_ctl(epoll_.get(), EPOLL_CTL_DEL, fd, nullptr);
  handlers_.erase(fd);
}

void EventLoop::Post(Work work) {
  {
    const std::lock_guard lock(mutex_);
    posted_.push_back(std::move(work));
  }
  const uint64_t one = 1;
  (void)!write(wake_.get(), &one,
               sizeof(one));  // fails only when the counter is full, and then the loop wakes anyway
}

void EventLoop::Stop() {
  {
    const std::lock_guard lock(mutex_);
    stopping_ = true;
  }
  Post([] {});
}

bool EventLoop::RunPosted() {
  std::vector<Work> work;
  bool stop = false;
  {
    const std::lock_guard lock(mutex_);
    work.swap(posted_);
    stop = stopping_;
  }
  for (Work& item : work) std::move(item)();
  return !stop;
}

void EventLoop::Run(const std::function<TimePoint()>& tick) {
  std::array<epoll_event, 64> events;
  while (RunPosted()) {
    const TimePoint next = tick();
    int timeout_ms = -1;
    if (next != kNoDeadline) {
      const auto left = std::chrono::ceil<std::chrono::milliseconds>(next - Clock::System().Now());
      timeout_ms = static_cast<int>(std::clamp<int64_t>(left.count(), 0, 60'000));
    }
    const int count = epoll_wait(epoll_.get(), events.data(), events.size(), timeout_ms);
    for (int i = 0; i < count; ++i) {
      const int fd = events[static_cast<size_t>(i)].data.fd;
      if (fd == wake_.get()) {
        uint64_t ignored = 0;
        (void)!read(fd, &ignored, sizeof(ignored));
        continue;
      }
      const auto found = handlers_.find(fd);
      if (found == handlers_.end()) continue;  // removed earlier in this round
      const std::shared_ptr<Handler> handler = found->second;
      (*handler)(events[static_cast<size_t>(i)].events);
    }
  }
}

void EventLoop::RunRemaining() {
  while (true) {
    std::vector<Work> work;
    {
      const std::lock_guard lock(mutex_);
      work.swap(posted_);
    }
    if (work.empty()) return;
    for (Work& item : work) std::move(item)();
  }
}

}  // namespace millrace::transfer
