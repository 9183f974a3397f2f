#pragma once
// The requests that run and those that ended last, for the live view. Never their text.

#include <cstdint>
#include <deque>
#include <mutex>
#include <string>

#include "base/clock.h"
#include "base/json.h"

namespace millrace::server {

// Where the time of one choice went on its worker, microseconds.
struct PhaseTimes {
  bool known = false;  // the worker has said them
  int64_t queue_us = 0;
  int64_t prefill_us = 0;
  int64_t transfer_us = 0;
  int64_t post_us = 0;         // of the transfer, see worker.proto
  int64_t commit_us = 0;       // likewise
  std::string prefill_worker;  // empty: the decode worker itself
};

struct RequestRecord {
  std::string id;
  std::string key;  // name of the API key, or empty
  int32_t prompt_tokens = 0;
  int32_t cached_tokens = 0;  // of these
  int32_t completion_tokens = 0;
  int32_t longest_choice_tokens = 0;  // of these, those of the choice that has most
  TimePoint accepted;
  TimePoint admitted;  // these four: TimePoint() while it has not come to that
  TimePoint first_token;
  TimePoint second_token;  // of the first choice
  TimePoint ended;
  std::string outcome;  // "" while it runs; ok, or why it failed
  PhaseTimes phases;    // of the first choice
};

// Thread-safe; bounded.
class RequestLog {
 public:
  // Adds the record, or replaces the one of the same id.
  void Put(const RequestRecord& record);
  // Newest first, times in milliseconds, `now` for what has not ended.
  Json ToJson(TimePoint now) const;

 private:
  static constexpr size_t kRecordsMax = 64;
  mutable std::mutex mutex_;
  std::deque<RequestRecord> records_;  // oldest first
};

}  // namespace millrace::server
