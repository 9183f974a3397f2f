// What of a sequence the prefix cache has, and what it gets.

#include <algorithm>
#include <cstring>

#include "engine/core/engine_core.h"
#include "engine/kv/page_keys.h"

namespace millrace::engine {

// The cached beginning of the sequence's text that can be had at once and quicker than by computing it. At
// least one token is left to compute: somebody needs its logits.
std::vector<CachedPage*> EngineCore::FindCached(Sequence* sequence) const {
  if (!options_.prefix_cache || sequence->is_scoring()) return {};
  ExtendPageKeys(sequence->cache_root, sequence->tokens, &sequence->page_keys);
  const auto pages_max = static_cast<size_t>((sequence->num_tokens() - 1) / kPageTokens);
  const auto keys = std::span(sequence->page_keys);
  std::vector<CachedPage*> found =
      cache_.Match(sequence->cache_root, sequence->tokens, keys.first(std::min(keys.size(), pages_max)));
  const auto end = std::find_if(found.begin(), found.end(), [this](const CachedPage* node) {
    return node->page < 0 && (node->host_slot < 0 || !Pays(tiers_->take_seconds()));
  });
  found.erase(end, found.end());
  return found;
}

// Pages that can be had by somebody who holds `found`, all of it in the pool.
int32_t EngineCore::AvailableBeside(std::span<CachedPage* const> found) const {
  return cache_.num_available() -
         static_cast<int32_t>(std::count_if(found.begin(), found.end(), [](const CachedPage* node) {
           return node->page < 0 || node->idle_since != 0;
         }));
}

// Puts the pages of `found` at the start of the sequence's empty page table. Who exports them holds them
// under its ticket too; an import's ticket does not: nobody may write to them.
void EngineCore::TakeCached(Sequence* sequence, std::span<CachedPage* const> found) {
  // First what nobody may evict any more, then what needs room.
  for (CachedPage* const node : found) {
    if (node->page >= 0) {
      cache_.Hold(node->page, PageHolder::kRequest);
    } else {
      tiers_->Pin(node, true);
    }
  }
  for (CachedPage* const node : found) {
    if (node->page < 0) {
      cache_.Load(node);  // a failure is in copy_error_ and ends all
      tiers_->Pin(node, false);
    }
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
  const auto pages = std::span(sequence->pages).first(static_cast<size_t>(sequence->num_cached_pages));
  if (const Status status = backend_->ToHost(pages); !status.ok()) copy_error_ = status;
  for (int32_t layer = 0; layer < layout_.num_layers; ++layer) {
    sequence->prefill_sink->OnLayer(layer, 0, pages);
  }
}

bool EngineCore::CopyOut(PageId page, std::span<std::byte> into) {
  if (const Status status = backend_->ToHost(std::span(&page, 1)); !status.ok()) {
    copy_error_ = status;
    return false;
  }
  for (int32_t layer = 0; layer < layout_.num_layers; ++layer) {
    std::memcpy(into.data() + static_cast<size_t>(layer) * layout_.piece_bytes(),
                backend_->kv_memory().data() + layout_.piece_offset(layer, page), layout_.piece_bytes());
  }
  return true;
}

bool EngineCore::CopyIn(PageId page, std::span<const std::byte> from) {
  for (int32_t layer = 0; layer < layout_.num_layers; ++layer) {
    std::memcpy(backend_->kv_memory().data() + layout_.piece_offset(layer, page),
                from.data() + static_cast<size_t>(layer) * layout_.piece_bytes(), layout_.piece_bytes());
  }
  if (const Status status = backend_->FromHost(std::span(&page, 1)); !status.ok()) copy_error_ = status;
  return copy_error_.ok();
}

// A page that comes from a lower tier must not take longer than computing it; what was not measured yet is
// tried.
bool EngineCore::Pays(double seconds_per_page) const {
  const double compute = step_cost_.seconds_per_token() * kPageTokens;
  return compute == 0 || seconds_per_page <= compute;
}

// Pages of a queued sequence that only the file has are read while it waits, if that is quicker than
// computing them.
void EngineCore::BeginFetch(Sequence* sequence) {
  sequence->fetch_begun = true;
  sequence->fetch_until = options_.clock->Now();
  if (tiers_ == nullptr || !options_.prefix_cache) return;
  if (!Pays(tiers_->fetch_seconds() + tiers_->take_seconds())) return tiers_->Discount();
  ExtendPageKeys(sequence->cache_root, sequence->tokens, &sequence->page_keys);
  int32_t num_fetched = 0;
  for (CachedPage* const node : cache_.Match(sequence->cache_root, sequence->tokens, sequence->page_keys)) {
    if (node->page >= 0 || node->host_slot >= 0) continue;
    if (!tiers_->Fetch(node)) break;
    ++num_fetched;
  }
  const double compute = step_cost_.seconds_per_token() * kPageTokens;
  constexpr double kPatience = 1;  // seconds for a page, before any was computed
  sequence->fetch_until += std::chrono::duration_cast<Duration>(
      std::chrono::duration<double>(num_fetched * (compute > 0 ? compute : kPatience)));
}

bool EngineCore::Fetching(const Sequence& sequence) const {
  if (!sequence.fetch_begun || options_.clock->Now() >= sequence.fetch_until) return false;
  const auto nodes = cache_.Match(sequence.cache_root, sequence.tokens, sequence.page_keys);
  return std::any_of(nodes.begin(), nodes.end(), [](const CachedPage* node) {
    return node->page < 0 && node->host_slot < 0 && node->operation != 0;
  });
}

}  // namespace millrace::engine
