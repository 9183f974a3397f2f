// Who gets pages. A running sequence that must grow comes first, then imports that already hold pages, then
// whoever waits for admission, in rank order and without overtaking.

#include <algorithm>
#include <utility>

#include "base/log.h"
#include "engine/core/engine_core.h"

namespace millrace::engine {

// Takes pages for the sequence; in the roles whose pages a transfer touches, the ticket holds them from now
// on too.
bool EngineCore::Allocate(Sequence* sequence, int32_t count) {
  if (!cache_.Allocate(count, PageHolder::kRequest, &sequence->pages)) return false;
  const bool transfers =
      sequence->role == SequenceRole::kPrefill ||
      (sequence->role == SequenceRole::kImport && sequence->state != SequenceState::kRunning);
  if (!transfers) return true;
  for (const PageId page : std::span(sequence->pages).last(static_cast<size_t>(count))) {
    HoldForTicket(sequence, page);
  }
  return true;
}

void EngineCore::HoldForTicket(Sequence* sequence, PageId page) {
  if (sequence->ticket_released) return;
  cache_.Hold(page, PageHolder::kTicket);
  tickets_[sequence->request.id].push_back(page);
}

void EngineCore::DropPages(Sequence* sequence) {
  // Backwards, so that of a text the cache forgets the end first.
  for (auto page = sequence->pages.rbegin(); page != sequence->pages.rend(); ++page) {
    cache_.Release(*page, PageHolder::kRequest);
  }
  sequence->pages.clear();
  sequence->num_computed = 0;
  sequence->num_cached_pages = 0;
  sequence->cached_tail = nullptr;
  sequence->prefill_begun = false;
  sequence->mtp_begin = -1;
  sequence->mtp_hidden.clear();
  sequence->draft = -1;
}

// One page for every running sequence that may still grow, so that newcomers do not cause preemptions at
// once.
int32_t EngineCore::GrowthReserve() const {
  return static_cast<int32_t>(std::count_if(running_.begin(), running_.end(), [](const Sequence* sequence) {
    return sequence->role != SequenceRole::kPrefill &&
           PagesFor(sequence->tokens_max - 1) > sequence->num_pages();
  }));
}

void EngineCore::HandOutPages() {
  GrowRunning();
  for (Sequence* sequence : importing_) {
    while (!sequence->grants.empty() && AnswerGrant(sequence)) {
    }
  }
  while (true) {
    // Who waits for the file, for a bounded time, and an import that asks for nothing yet are not in the way
    // of those behind them.
    const auto next = std::find_if(queued_.begin(), queued_.end(), [this](const Sequence* sequence) {
      return (sequence->role != SequenceRole::kImport || !sequence->grants.empty()) && !Fetching(*sequence);
    });
    if (next == queued_.end()) return;
    if (importing_.size() + running_.size() >= static_cast<size_t>(options_.running_max)) return;
    Sequence* const sequence = *next;
    if (!sequence->fetch_begun) {
      BeginFetch(sequence);
      if (Fetching(*sequence)) continue;
    }
    if (sequence->role == SequenceRole::kImport) {
      if (!AnswerGrant(sequence)) return;
      Move(sequence, SequenceState::kImporting);
      while (!sequence->grants.empty() && AnswerGrant(sequence)) {
      }
    } else if (!AdmitQueued(sequence)) {
      return;
    }
  }
}

// Gives the sequence the pages of its text, those that the cache has and new ones for what it has to compute,
// if one more to grow into is there too. False if it has to wait; a sequence that has outgrown the whole pool
// ends instead.
bool EngineCore::AdmitQueued(Sequence* sequence) {
  const int32_t num_pages = PagesFor(sequence->num_tokens());
  if (num_pages > layout_.num_pages) {
    End(sequence, ResourceExhausted("{} tokens need {} pages; the KV memory has {}", sequence->num_tokens(),
                                    num_pages, layout_.num_pages));
    return true;
  }
  const bool grows =
      sequence->role != SequenceRole::kPrefill && PagesFor(sequence->tokens_max - 1) > num_pages;
  const std::vector<CachedPage*> found = FindCached(sequence);
  const auto num_found = static_cast<int32_t>(found.size());
  const int32_t wanted = std::min(num_pages + (grows ? 1 : 0) + GrowthReserve(), layout_.num_pages);
  if (wanted - num_found > AvailableBeside(found)) return false;
  TakeCached(sequence, found);
  Allocate(sequence, num_pages - num_found);
  sequence->num_computed = num_found * kPageTokens;
  sequence->num_prefill = sequence->num_tokens();
  Move(sequence, SequenceState::kRunning);
  if (sequence->role == SequenceRole::kPrefill && num_found > 0) TellCached(sequence);
  return true;
}

// Imports hold pages while they wait for more, so that careless grants could leave all of them waiting for
// ever. A grant is safe if afterwards the imports can still complete one after the other, each using the free
// pages and those of the imports before it (the banker's algorithm; with one kind of resource, least
// remaining need first is the best order). Cached pages may be shared, so that they do not count as coming
// back.
bool EngineCore::GrantIsSafe(const Sequence& sequence, std::span<CachedPage* const> found,
                             int32_t count) const {
  int32_t available = AvailableBeside(found) - count - GrowthReserve();
  if (available < 0) return false;
  std::vector<std::pair<int32_t, int32_t>> imports;  // pages still needed, pages that come back
  const auto add = [&](const Sequence& import, int32_t num_found, int32_t granted) {
    imports.emplace_back(PagesFor(import.num_imported) - import.num_pages() - num_found - granted,
                         import.num_pages() - import.num_cached_pages + granted);
  };
  for (const Sequence* import : importing_) {
    if (import != &sequence) add(*import, 0, 0);
  }
  add(sequence, static_cast<int32_t>(found.size()), count);
  std::sort(imports.begin(), imports.end());
  return std::all_of(imports.begin(), imports.end(), [&available](const auto& import) {
    available += import.second;
    return import.first <= available - import.second;
  });
}

// Answers the sequence's first pending grant if that is safe.
bool EngineCore::AnswerGrant(Sequence* sequence) {
  // The first grant comes after what is cached.
  std::vector<CachedPage*> found;
  if (sequence->pages.empty()) found = FindCached(sequence);
  const int32_t first_page = sequence->num_pages() + static_cast<int32_t>(found.size());
  const int32_t count =
      std::min(sequence->grants.front().num_pages, PagesFor(sequence->num_imported) - first_page);
  if (count > 0 && !GrantIsSafe(*sequence, found, count)) return false;
  Engine::GrantCallback callback = std::move(sequence->grants.front().callback);
  sequence->grants.pop_front();
  if (sequence->pages.empty()) TakeCached(sequence, found);
  Allocate(sequence, count);
  std::move(callback)(
      GrantedPages{first_page, std::vector<PageId>(sequence->pages.end() - count, sequence->pages.end())});
  return true;
}

// Page tables that cover the token to compute next, best rank first. A sequence that gets no page sits this
// step out.
void EngineCore::GrowRunning() {
  std::vector<Sequence*> growing;
  for (Sequence* sequence : running_) {
    if (sequence->num_pages() < PagesFor(sequence->num_tokens())) growing.push_back(sequence);
  }
  for (Sequence* sequence : growing) {
    while (sequence->state == SequenceState::kRunning && !Grow(sequence)) {
      Sequence* const victim = PreemptionVictim();
      // Nothing to take from lower ranks: tickets hold the pages, and their release comes from outside.
      if (victim == nullptr || RanksBefore()(victim, sequence)) break;
      Preempt(victim);
    }
  }
}

bool EngineCore::Grow(Sequence* sequence) {
  return Allocate(sequence, PagesFor(sequence->num_tokens()) - sequence->num_pages());
}

// The running sequence of the lowest rank whose pages can be computed again here and are free once it lets
// go.
Sequence* EngineCore::PreemptionVictim() const {
  const auto victim = std::find_if(running_.rbegin(), running_.rend(), [this](const Sequence* sequence) {
    return sequence->role != SequenceRole::kPrefill && !tickets_.contains(sequence->request.id);
  });
  return victim == running_.rend() ? nullptr : *victim;
}

// Prompt and answer so far are computed again later. Sampling depends on the position alone, so nothing that
// the client saw changes and nothing is sent twice.
void EngineCore::Preempt(Sequence* sequence) {
  LogDebug("request {}: preempted at {} tokens, {} pages", sequence->request.id, sequence->num_tokens(),
           sequence->num_pages());
  ++preemptions_;
  DropPages(sequence);
  sequence->role = SequenceRole::kGenerate;
  sequence->fetch_begun = false;
  Move(sequence, SequenceState::kQueued);
}

}  // namespace millrace::engine
