#include "server/gateway/request_log.h"

#include <algorithm>

namespace millrace::server {

void RequestLog::Put(const RequestRecord& record) {
  std::lock_guard lock(mutex_);
  const auto found = std::find_if(records_.rbegin(), records_.rend(),
                                  [&](const RequestRecord& other) { return other.id == record.id; });
  if (found != records_.rend()) {
    *found = record;
    return;
  }
  records_.push_back(record);
  if (records_.size() > kRecordsMax) records_.pop_front();
}

Json RequestLog::ToJson(TimePoint now) const {
  std::lock_guard lock(mutex_);
  Json list = Json::array();
  for (auto record = records_.rbegin(); record != records_.rend(); ++record) {
    const auto since = [&](TimePoint from, TimePoint to) -> Json {
      if (from == TimePoint()) return nullptr;
      return 1000 * Seconds((to == TimePoint() ? now : to) - from);
    };
    const bool ended = record->ended != TimePoint();
    // What never came to a phase spent all its time before it.
    const TimePoint queue_end = record->admitted != TimePoint() ? record->admitted : record->ended;
    const TimePoint first = record->first_token != TimePoint() ? record->first_token : record->ended;
    list.push_back({{"id", record->id},
                    {"key", record->key},
                    {"prompt_tokens", record->prompt_tokens},
                    {"completion_tokens", record->completion_tokens},
                    {"outcome", record->outcome},
                    {"running", !ended},
                    {"total_ms", since(record->accepted, record->ended)},
                    {"gateway_queue_ms", since(record->accepted, queue_end)},
                    {"first_token_ms", since(record->admitted, first)},
                    {"decode_ms", since(record->first_token, record->ended)},
                    {"worker_queue_ms", static_cast<double>(record->phases.queue_us) / 1000},
                    {"prefill_ms", static_cast<double>(record->phases.prefill_us) / 1000},
                    {"transfer_ms", static_cast<double>(record->phases.transfer_us) / 1000},
                    {"prefill_worker", record->phases.prefill_worker}});
  }
  return list;
}

}  // namespace millrace::server
