#include "server/gateway/gateway_context.h"

#include <algorithm>
#include <boost/asio/post.hpp>

#include "base/log.h"

namespace millrace::server {
namespace {

constexpr size_t kUnknownFieldsMax = 128;
constexpr size_t kFieldNameMax = 64;

}  // namespace

uint64_t Stops::Add(std::function<void()> stop, const std::string& name) {
  std::lock_guard lock(mutex_);
  stops_.emplace(++next_id_, Entry{std::move(stop), name});
  return next_id_;
}

void Stops::Remove(uint64_t id) {
  std::lock_guard lock(mutex_);
  stops_.erase(id);
}

void Stops::StopAll() {
  std::lock_guard lock(mutex_);
  for (const auto& [id, entry] : stops_) entry.stop();
}

bool Stops::Stop(const std::string& name) {
  std::lock_guard lock(mutex_);
  bool found = false;
  for (const auto& [id, entry] : stops_) {
    if (entry.name != name) continue;
    entry.stop();
    found = true;
  }
  return found;
}

void UnknownFields::Note(const std::vector<std::string>& fields) {
  std::lock_guard lock(mutex_);
  for (const std::string& field : fields) {
    if (seen_.size() >= kUnknownFieldsMax || !seen_.insert(field).second) continue;
    std::string shown = field.substr(0, kFieldNameMax);
    // What a client wrote lands in the log only as plain characters.
    std::replace_if(
        shown.begin(), shown.end(), [](char c) { return c < ' ' || c > '~'; }, '?');
    LogWarning("requests carry the field '{}', which is not known and changes nothing (said once)", shown);
  }
}

ApiError GatewayContext::FailureOf(const Status& status) const {
  ApiError error = FromStatus(status);
  error.retry_after_seconds = admission.RetryAfterSeconds();
  return error;
}

TimePoint GatewayContext::DeadlineOf(const ApiRequest& request) const {
  Duration timeout = options.request_timeout;
  if (request.timeout_seconds) {
    timeout = std::min(timeout, std::chrono::duration_cast<Duration>(
                                    std::chrono::duration<double>(*request.timeout_seconds)));
  }
  return Clock::System().Now() + timeout;
}

uint64_t GatewayContext::AddAnswerStop(const boost::asio::any_io_executor& executor,
                                       const std::shared_ptr<Answer>& answer, const std::string& id) {
  return answer_stops.Add(
      [executor, weak = std::weak_ptr<Answer>(answer), this] {
        const Status reason = draining ? Unavailable("this gateway is shutting down")
                                       : Aborted("the answer was stopped by the operator");
        boost::asio::post(executor, [weak, reason] {
          if (const auto alive = weak.lock(); alive != nullptr) alive->Cancel(reason);
        });
      },
      id);
}

}  // namespace millrace::server
