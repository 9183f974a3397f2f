#include "server/gateway/gateway_context.h"

#include <algorithm>

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

}  // namespace millrace::server
