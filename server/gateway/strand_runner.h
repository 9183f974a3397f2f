#pragma once
// Turns on an executor of the gateway's threads.

#include <boost/asio/any_io_executor.hpp>
#include <boost/asio/steady_timer.hpp>
#include <map>
#include <memory>

#include "server/rpc/task_runner.h"

namespace millrace::server {

// Post: any thread; timers: on the executor, which must be a strand. Shared by whoever posts and by the
// timers that are set.
class StrandRunner final : public TaskRunner, public std::enable_shared_from_this<StrandRunner> {
 public:
  explicit StrandRunner(boost::asio::any_io_executor executor) : executor_(std::move(executor)) {}

  TimePoint Now() const override { return Clock::System().Now(); }
  void Post(Task task) override;
  TimerId PostAt(TimePoint when, Task task) override;
  void CancelTimer(const TimerId& timer) override;

 private:
  const boost::asio::any_io_executor executor_;
  std::map<TimerId, boost::asio::steady_timer> timers_;
  uint64_t next_number_ = 0;
};

}  // namespace millrace::server
