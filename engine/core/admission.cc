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
  if (!pool_.Allocate(count, PageHolder::kRequest, &sequence->pages)) return false;
  const bool transfers =
      sequence->role == SequenceRole::kPrefill ||
      (sequence->role == SequenceRole::kImport && sequence->state != SequenceState::kRunning);
  if (transfers && !sequence->ticket_released && count > 0) {
    std::vector<PageId>& ticket = tickets_[sequence->request.id];
    for (const PageId page : std::span(sequence->pages).last(static_cast<size_t>(count))) {
      pool_.Hold(page, PageHolder::kTicket);
      ticket.push_back(page);
    }
  }
  return true;
}

void EngineCore::DropPages(Sequence* sequence) {
  for (const PageId page : sequence->pages) pool_.Release(page, PageHolder::kRequest);
  sequence->pages.clear();
  sequence->num_computed = 0;
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
    // An import that asks for nothing yet is not in the way of those behind it.
    const auto next = std::find_if(queued_.begin(), queued_.end(), [](const Sequence* sequence) {
      return sequence->role != SequenceRole::kImport || !sequence->grants.empty();
    });
    if (next == queued_.end()) return;
    if (importing_.size() + running_.size() >= static_cast<size_t>(options_.running_max)) return;
    Sequence* const sequence = *next;
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

// Gives the sequence the pages of all that it has to compute, if one more to grow into is there too. False if
// it has to wait; a sequence that has outgrown the whole pool ends instead.
bool EngineCore::AdmitQueued(Sequence* sequence) {
  const int32_t num_pages = PagesFor(sequence->num_tokens());
  if (num_pages > pool_.num_pages()) {
    End(sequence, ResourceExhausted("{} tokens need {} pages; the KV memory has {}", sequence->num_tokens(),
                                    num_pages, pool_.num_pages()));
    return true;
  }
  const bool grows =
      sequence->role != SequenceRole::kPrefill && PagesFor(sequence->tokens_max - 1) > num_pages;
  const int32_t wanted = std::min(num_pages + (grows ? 1 : 0) + GrowthReserve(), pool_.num_pages());
  if (wanted > pool_.num_free()) return false;
  Allocate(sequence, num_pages);
  Move(sequence, SequenceState::kRunning);
  return true;
}

// Imports hold pages while they wait for more, so that careless grants could leave all of them waiting for
// ever. A grant is safe if afterwards the imports can still complete one after the other, each using the free
// pages and those of the imports before it (the banker's algorithm; with one kind of resource, least
// remaining need first is the best order).
bool EngineCore::GrantIsSafe(const Sequence& sequence, int32_t count) const {
  int32_t available = pool_.num_free() - count - GrowthReserve();
  if (available < 0) return false;
  std::vector<std::pair<int32_t, int32_t>> imports;  // pages still needed, pages held
  const auto add = [&](const Sequence& import, int32_t granted) {
    const int32_t held = import.num_pages() + granted;
    imports.emplace_back(PagesFor(import.num_imported) - held, held);
  };
  for (const Sequence* import : importing_) {
    if (import != &sequence) add(*import, 0);
  }
  add(sequence, count);
  std::sort(imports.begin(), imports.end());
  return std::all_of(imports.begin(), imports.end(), [&available](const auto& import) {
    available += import.second;
    return import.first <= available - import.second;
  });
}

// Answers the sequence's first pending grant if that is safe.
bool EngineCore::AnswerGrant(Sequence* sequence) {
  const int32_t count = sequence->grants.front().num_pages;
  if (!GrantIsSafe(*sequence, count)) return false;
  Engine::GrantCallback callback = std::move(sequence->grants.front().callback);
  sequence->grants.pop_front();
  Allocate(sequence, count);
  std::move(callback)(std::vector<PageId>(sequence->pages.end() - count, sequence->pages.end()));
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
  Move(sequence, SequenceState::kQueued);
}

}  // namespace millrace::engine
