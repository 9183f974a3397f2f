#include "engine/scheduler/scheduler.h"

#include <algorithm>

#include "base/check.h"

namespace millrace::engine {
namespace {

void SortByRank(std::vector<const ScheduleEntry*>* entries) {
  std::sort(entries->begin(), entries->end(), [](const ScheduleEntry* a, const ScheduleEntry* b) {
    if (a->priority != b->priority) return a->priority > b->priority;
    if (a->arrival != b->arrival) return a->arrival < b->arrival;
    return a->slot < b->slot;
  });
}

}  // namespace

std::vector<ScheduledRun> Schedule(std::span<const ScheduleEntry> entries, const ScheduleLimits& limits) {
  MR_CHECK(limits.tokens_max > kPageTokens,
           "{} tokens per step leave no room for a chunk beside a decoding sequence", limits.tokens_max);
  MR_CHECK(limits.runs_max > 0);
  std::vector<const ScheduleEntry*> decoding, prefilling;
  for (const ScheduleEntry& entry : entries) {
    MR_CHECK(entry.tokens_pending > 0 && (!entry.decoding || entry.tokens_pending == 1),
             "slot {} has {} tokens pending", entry.slot, entry.tokens_pending);
    (entry.decoding ? decoding : prefilling).push_back(&entry);
  }
  SortByRank(&decoding);
  SortByRank(&prefilling);

  int32_t decoding_max = std::min(limits.tokens_max, limits.runs_max);
  if (!prefilling.empty()) {
    decoding_max = std::min(limits.tokens_max - PrefillShare(limits.tokens_max), limits.runs_max - 1);
    decoding_max = std::max(decoding_max, 1);
  }
  std::vector<ScheduledRun> runs;
  int32_t tokens_left = limits.tokens_max;
  for (const ScheduleEntry* entry : decoding) {
    if (static_cast<int32_t>(runs.size()) == decoding_max) break;
    runs.push_back({entry->slot, 1});
    --tokens_left;
  }
  for (const ScheduleEntry* entry : prefilling) {
    if (tokens_left == 0 || static_cast<int32_t>(runs.size()) == limits.runs_max) break;
    int32_t num_tokens = std::min(entry->tokens_pending, tokens_left);
    if (num_tokens < entry->tokens_pending) num_tokens -= num_tokens % kPageTokens;
    if (num_tokens == 0) continue;  // what is left may still do for a short prompt behind this one
    runs.push_back({entry->slot, num_tokens});
    tokens_left -= num_tokens;
  }
  return runs;
}

}  // namespace millrace::engine
