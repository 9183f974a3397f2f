#pragma once
// One live request inside the engine. Plain data; engine thread only.

#include <algorithm>
#include <cstdint>
#include <deque>
#include <memory>
#include <set>
#include <span>
#include <vector>

#include "engine/core/engine.h"
#include "engine/kv/prefix_cache.h"

namespace millrace::engine {

enum class SequenceRole { kGenerate, kPrefill, kImport };

// kQueued: holds no pages; waits for admission, an import for its first grant. kImporting: an import that
// holds pages. kRunning: in prefill or decode. EngineCore::Move is the one place that changes it.
enum class SequenceState { kQueued, kImporting, kRunning };

struct PendingGrant {
  int32_t num_pages = 0;
  Engine::GrantCallback callback;
};

struct Sequence {
  EngineRequest request;  // its prompt and output have moved to `tokens`
  SequenceRole role = SequenceRole::kGenerate;
  SequenceState state = SequenceState::kQueued;
  int64_t arrival = 0;  // order of submission; unique; kept by a preempted sequence
  std::unique_ptr<TokenSink> sink;
  PrefillSink* prefill_sink = nullptr;  // `sink` of role kPrefill, else null

  std::vector<int32_t> tokens;  // prompt, then output
  int32_t num_prompt = 0;
  int32_t num_imported = 0;         // tokens at submission: what an import's grants must cover
  int32_t tokens_max = 0;           // the sequence ends at this many tokens (max_tokens or the context)
  int32_t num_computed = 0;         // tokens whose KV is in `pages`
  int32_t num_prefill = 0;          // tokens when it was admitted: what is computed before it decodes
  std::vector<int32_t> end_tokens;  // that end the answer, empty with ignore_eos but for the request's own

  std::vector<PageId> pages;  // page table; one request hold on each
  // Its first num_cached_pages pages are nodes of the prefix cache, the last of them is cached_tail.
  int32_t num_cached_pages = 0;
  CachedPage* cached_tail = nullptr;
  uint64_t cache_root = 0;
  std::vector<uint64_t> page_keys;  // of the full pages of `tokens`, as far as asked for
  bool cacheable = false;           // false from a page on whose key another content has
  bool prefill_begun = false;       // since its pages were handed out
  bool mtp_fill = false;  // the text before decoding gets the MTP layer's rows; decided when that begins
  // Final hidden states of rows [mtp_begin, num_computed), which the MTP layer has not seen; mtp_begin is -1
  // when rows before are missing: then nothing is drafted until the text is computed again.
  int32_t mtp_begin = -1;
  std::vector<float> mtp_hidden;
  std::vector<SampledToken>
      prompt_scores;                // of prompt tokens 1.., as far as computed; go with the first token
  int32_t draft = -1;               // the token after the pending one, as the MTP layer expects it; -1 none
  bool fetch_begun = false;         // pages that only the file has were asked for while it queues
  TimePoint fetch_until;            // by then it would have been as quick to compute them
  int32_t num_found = -1;           // prompt tokens found in the cache at the first admission; -1 before
  std::deque<PendingGrant> grants;  // import: asked for, not answered
  bool ticket_released = false;     // from then on no page gets a ticket hold

  int32_t num_tokens() const { return static_cast<int32_t>(tokens.size()); }
  int32_t num_pages() const { return static_cast<int32_t>(pages.size()); }
  int32_t num_output() const { return num_tokens() - num_prompt; }
  int32_t num_pending() const { return num_tokens() - num_computed; }
  bool is_decoding() const { return num_computed > 0 && num_computed >= num_prefill; }
  bool is_end(int32_t token) const {
    return std::find(end_tokens.begin(), end_tokens.end(), token) != end_tokens.end();
  }
  // Every row of its next chunk has a log-probability to tell.
  bool is_scoring() const {
    return request.sampling.prompt_logprobs && num_output() == 0 &&
           static_cast<int32_t>(prompt_scores.size()) + 1 < num_prompt;
  }
  std::span<const int32_t> prompt() const { return std::span(tokens).first(static_cast<size_t>(num_prompt)); }
  std::span<const int32_t> output() const {
    return std::span(tokens).subspan(static_cast<size_t>(num_prompt));
  }
};

// Higher priority first, then earlier arrival.
struct RanksBefore {
  bool operator()(const Sequence* a, const Sequence* b) const {
    if (a->request.priority != b->request.priority) return a->request.priority > b->request.priority;
    return a->arrival < b->arrival;
  }
};
using SequenceSet = std::set<Sequence*, RanksBefore>;

}  // namespace millrace::engine
