#include "server/gateway/strand_runner.h"

#include <boost/asio/post.hpp>
#include <utility>

namespace millrace::server {

namespace net = boost::asio;

void StrandRunner::Post(Task task) {
  net::post(executor_, [task = std::move(task)]() mutable { std::move(task)(); });
}

TaskRunner::TimerId StrandRunner::PostAt(TimePoint when, Task task) {
  const TimerId id{when, next_number_++};
  const auto timer = timers_.try_emplace(id, executor_, when).first;
  timer->second.async_wait(
      [self = shared_from_this(), id, task = std::move(task)](const boost::system::error_code&) mutable {
        // Cancelled ones are gone, also those whose time had come already.
        if (self->timers_.erase(id) > 0) std::move(task)();
      });
  return id;
}

void StrandRunner::CancelTimer(const TimerId& timer) { timers_.erase(timer); }

}  // namespace millrace::server
