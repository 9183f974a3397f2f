// What of a sequence the prefix cache has, and what it gets.

#include <algorithm>

#include "engine/core/engine_core.h"
#include "engine/kv/page_keys.h"

namespace millrace::engine {

// The cached beginning of the sequence's text. At least one token is left to compute: somebody needs its
// logits.
std::vector<CachedPage*> EngineCore::FindCached(Sequence* sequence) const {
  if (!options_.prefix_cache) return {};
  ExtendPageKeys(sequence->cache_root, sequence->tokens, &sequence->page_keys);
  const auto pages_max = static_cast<size_t>((sequence->num_tokens() - 1) / kPageTokens);
  const auto keys = std::span(sequence->page_keys);
  return cache_.Match(sequence->cache_root, sequence->tokens, keys.first(std::min(keys.size(), pages_max)));
}

// Pages that can be had by somebody who holds `found`.
int32_t EngineCore::AvailableBeside(std::span<CachedPage* const> found) const {
  return cache_.num_available() -
         static_cast<int32_t>(std::count_if(found.begin(), found.end(),
                                            [](const CachedPage* node) { return node->idle_since != 0; }));
}

// Puts the pages of `found` at the start of the sequence's empty page table. Who exports them holds them
// under its ticket too; an import's ticket does not: nobody may write to them.
void EngineCore::TakeCached(Sequence* sequence, std::span<CachedPage* const> found) {
  for (CachedPage* const node : found) {
    cache_.Hold(node->page, PageHolder::kRequest);
    sequence->pages.push_back(node->page);
    if (sequence->role == SequenceRole::kPrefill) HoldForTicket(sequence, node->page);
  }
  sequence->num_cached_pages = static_cast<int32_t>(found.size());
  sequence->cached_tail = found.empty() ? nullptr : found.back();
  const int32_t num_found = sequence->num_cached_pages * kPageTokens;
  if (sequence->num_found < 0) sequence->num_found = std::min(num_found, sequence->num_prompt);
  cache_asked_tokens_ += static_cast<uint64_t>(sequence->num_tokens());
  cache_found_tokens_ += static_cast<uint64_t>(num_found);
}

// Gives the cache the full pages that have been computed. Where it has an equal page already, the sequence
// goes on with that one and its own is free (once no ticket holds it), so that what is in use is always a
// whole chain.
void EngineCore::CachePages(Sequence* sequence) {
  const int32_t num_full = sequence->num_computed / kPageTokens;
  if (!sequence->cacheable || sequence->num_cached_pages >= num_full) return;
  ExtendPageKeys(sequence->cache_root, sequence->tokens, &sequence->page_keys);
  for (int32_t i = sequence->num_cached_pages; i < num_full; ++i) {
    const auto at = static_cast<size_t>(i);
    PageId& page = sequence->pages[at];
    CachedPage* const node =
        cache_.Insert(sequence->cached_tail, sequence->cache_root, sequence->page_keys[at],
                      std::span(sequence->tokens).subspan(at * kPageTokens, kPageTokens), page);
    if (node == nullptr) {
      sequence->cacheable = false;
      return;
    }
    if (node->page != page) {
      cache_.Hold(node->page, PageHolder::kRequest);
      if (tickets_.contains(sequence->request.id)) HoldForTicket(sequence, node->page);
      cache_.Release(page, PageHolder::kRequest);
      page = node->page;
    }
    sequence->cached_tail = node;
    sequence->num_cached_pages = i + 1;
  }
}

// To the sink of a prefill request, the cached pages are a first chunk that took no time.
void EngineCore::TellCached(Sequence* sequence) {
  if (sequence->ticket_released) return;
  for (int32_t layer = 0; layer < layout_.num_layers; ++layer) {
    sequence->prefill_sink->OnLayer(
        layer, 0, std::span(sequence->pages).first(static_cast<size_t>(sequence->num_cached_pages)));
  }
}

}  // namespace millrace::engine
