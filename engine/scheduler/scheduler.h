#pragma once
// Picks the next batch. Pure policy: no clock, no pages, no I/O. Engine thread only.

#include <cstdint>
#include <span>
#include <vector>

#include "engine/kv/layout.h"

namespace millrace::engine {

// What the scheduler needs to know of one admitted sequence.
struct ScheduleEntry {
  int32_t slot = 0;            // the caller's name for the sequence
  int32_t tokens_pending = 0;  // tokens whose KV is not computed yet: 1 for a decoding sequence, the rest of
                               // the prompt for one in prefill
  bool decoding = false;
  int32_t priority = 0;
  int64_t arrival = 0;  // smaller = earlier
};

struct ScheduledRun {
  int32_t slot = 0;
  int32_t num_tokens = 0;
};

struct ScheduleLimits {
  int32_t tokens_max = 512;  // token budget of the step
  int32_t runs_max = 64;     // segments of the step
};

// The part of a step's budget that decoding sequences leave to prefill while any waits: a quarter, and at
// least a page, because a smaller chunk could not be cut.
constexpr int32_t PrefillShare(int32_t tokens_max) {
  return tokens_max / 4 > kPageTokens ? tokens_max / 4 : kPageTokens;
}

// Decoding sequences first, one token each, then prefill chunks in order of (priority, arrival) with what is
// left of the budget. While prefill waits, decoding leaves it PrefillShare tokens and one run; a caller with
// no more than tokens_max - PrefillShare sequences therefore never sees one of them left out. A prefill chunk
// that does not finish its sequence is a multiple of kPageTokens (chunks end at page borders, whatever else
// runs); room that is too small for the next chunk goes to the first prompt behind it that it can finish.
// Needs tokens_max > kPageTokens. O(n log n).
std::vector<ScheduledRun> Schedule(std::span<const ScheduleEntry> entries, const ScheduleLimits& limits);

}  // namespace millrace::engine
