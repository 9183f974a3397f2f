#include "tests/sim/model_engine.h"

#include <algorithm>
#include <cstring>
#include <numeric>
#include <utility>

#include "base/check.h"
#include "base/digest.h"

namespace millrace::sim {

using engine::kPageTokens;
using engine::PageId;
using engine::RequestId;
using std::chrono::microseconds;

namespace {

constexpr int32_t kVocabulary = 1000;
constexpr int32_t kChunkTokens = 2 * kPageTokens;

}  // namespace

ModelText::ModelText(const std::vector<int32_t>& tokens) {
  for (const int32_t token : tokens) Push(token);
}

void ModelText::Push(int32_t token) {
  const uint64_t before = chain_.empty() ? 7 : chain_.back();
  chain_.push_back(Mix64(before * 0x9e3779b97f4a7c15ULL + static_cast<uint64_t>(token)) | 1);
}

void ModelText::Fill(const engine::KvLayout& layout, std::span<std::byte> memory,
                     std::span<const PageId> pages, int32_t layer, int32_t first, int32_t last) const {
  for (int32_t at = first; at < last; ++at) {
    const PageId page = pages[static_cast<size_t>(at / kPageTokens)];
    for (int v = 0; v < 2; ++v) {
      const uint64_t word = Mix64(chain_[static_cast<size_t>(at)] + static_cast<uint64_t>(2 * layer + v));
      const uint64_t row[2] = {word, ~word};
      std::byte* const to = memory.data() + layout.piece_offset(layer, page);
      std::memcpy(to + layout.row_offset(v, 0, at % kPageTokens), row, sizeof row);
    }
  }
}

engine::KvLayout ModelLayout(int32_t num_pages) {
  return {.num_layers = 2,
          .num_pages = num_pages,
          .num_kv_heads = 1,
          .head_dim = 4,
          .dtype = engine::KvDType::kF32};
}

ModelDraw DrawFrom(const engine::KvLayout& layout, std::span<const std::byte> memory,
                   std::span<const PageId> pages, int32_t tokens, uint64_t seed, int32_t index,
                   int32_t max_tokens) {
  const size_t row_bytes = layout.row_offset(0, 0, 1);
  uint64_t digest = Mix64(seed) + static_cast<uint64_t>(index);
  for (int32_t layer = 0; layer < layout.num_layers; ++layer) {
    for (int32_t first = 0; first < tokens; first += kPageTokens) {
      const size_t piece = layout.piece_offset(layer, pages[static_cast<size_t>(first / kPageTokens)]);
      const size_t bytes = static_cast<size_t>(std::min(kPageTokens, tokens - first)) * row_bytes;
      for (int v = 0; v < 2; ++v)
        digest = Xxh3(memory.subspan(piece + layout.row_offset(v, 0, 0), bytes), digest);
    }
  }
  ModelDraw draw;
  draw.token = static_cast<int32_t>(digest % kVocabulary);
  if (index + 1 >= max_tokens) {
    draw.finish = engine::FinishReason::kLength;
  } else if ((digest >> 40) % 40 == 0) {
    draw.finish = engine::FinishReason::kStop;
  }
  return draw;
}

std::vector<ModelDraw> ModelAnswer(const std::vector<int32_t>& prompt, uint64_t seed, int32_t max_tokens) {
  const auto tokens = static_cast<int32_t>(prompt.size());
  const engine::KvLayout layout = ModelLayout(engine::PagesFor(tokens + max_tokens));
  std::vector<std::byte> memory(layout.total_bytes());
  std::vector<PageId> pages(static_cast<size_t>(layout.num_pages));
  std::iota(pages.begin(), pages.end(), 0);
  ModelText text(prompt);
  std::vector<ModelDraw> answer;
  int32_t filled = 0;
  do {
    for (int32_t layer = 0; layer < layout.num_layers; ++layer)
      text.Fill(layout, memory, pages, layer, filled, text.size());
    filled = text.size();
    answer.push_back(
        DrawFrom(layout, memory, pages, filled, seed, static_cast<int32_t>(answer.size()), max_tokens));
    text.Push(answer.back().token);
  } while (answer.back().finish == engine::FinishReason::kNone);
  return answer;
}

ModelEngine::ModelEngine(server::TaskRunner* thread, Random* random, int32_t num_pages,
                         const EngineBugs& bugs)
    : thread_(thread),
      random_(random),
      bugs_(bugs),
      process_(random->Next()),
      layout_(ModelLayout(num_pages)),
      memory_(layout_.total_bytes()),
      pages_(static_cast<size_t>(num_pages)) {
  config_.vocab_size = kVocabulary;
  config_.max_position = 1 << 20;
}

std::string ModelEngine::Left() const {
  if (!sequences_.empty())
    return fmt::format("{} requests, first {}", sequences_.size(), sequences_.begin()->first);
  if (!tickets_.empty()) return fmt::format("{} tickets, first {}", tickets_.size(), tickets_.begin()->first);
  for (size_t page = 0; page < pages_.size(); ++page) {
    if (pages_[page].request_holds != 0 || pages_[page].ticket_holds != 0)
      return fmt::format("page {} is held {} and {} times", page, pages_[page].request_holds,
                         pages_[page].ticket_holds);
  }
  return reserved_ == 0 ? "" : fmt::format("{} pages are reserved", reserved_);
}

Status ModelEngine::Generate(engine::EngineRequest request, std::unique_ptr<engine::TokenSink> sink) {
  return Add(std::move(request), std::move(sink), nullptr, Kind::kGenerate);
}
Status ModelEngine::Prefill(engine::EngineRequest request, std::unique_ptr<engine::PrefillSink> sink) {
  engine::PrefillSink* const prefill = sink.get();
  return Add(std::move(request), std::move(sink), prefill, Kind::kPrefill);
}
Status ModelEngine::BeginImport(engine::EngineRequest request, std::unique_ptr<engine::TokenSink> sink) {
  return Add(std::move(request), std::move(sink), nullptr, Kind::kImport);
}

Status ModelEngine::Add(engine::EngineRequest request, std::unique_ptr<engine::TokenSink> sink,
                        engine::PrefillSink* prefill, Kind kind) {
  auto s = std::make_shared<Sequence>();  // shared: a task holds it until it is moved on
  s->request = std::move(request);
  s->sink = std::move(sink);
  s->prefill = prefill;
  s->kind = kind;
  s->text = ModelText(s->request.prompt);
  for (const int32_t token : s->request.output) s->text.Push(token);
  thread_->Post([this, s] {
    const RequestId id = s->request.id;
    MR_CHECK(!sequences_.contains(id) && !tickets_.contains(id), "request {} comes twice", id);
    sequences_.emplace(id, std::move(*s));
    Admit();
  });
  return OkStatus();
}

ModelEngine::Sequence* ModelEngine::Find(RequestId id) {
  const auto found = sequences_.find(id);
  return found == sequences_.end() ? nullptr : &found->second;
}

int32_t ModelEngine::PromptPages(const Sequence& s) const {
  return engine::PagesFor(static_cast<int64_t>(s.request.prompt.size() + s.request.output.size()));
}
int32_t ModelEngine::AllPages(const Sequence& s) const {
  if (s.kind == Kind::kPrefill) return PromptPages(s);
  return engine::PagesFor(static_cast<int64_t>(s.request.prompt.size()) + s.request.sampling.max_tokens);
}

// The last token is always computed, or comes from elsewhere.
ModelEngine::Pages ModelEngine::Cached(const Sequence& s) const {
  Pages pages;
  for (int32_t tokens = kPageTokens; tokens < s.text.size(); tokens += kPageTokens) {
    const auto found = cache_.find(s.text.KeyOf(tokens));
    if (found == cache_.end()) break;
    pages.push_back(found->second);
  }
  return pages;
}

int32_t ModelEngine::FreePages() const {
  return static_cast<int32_t>(std::count_if(pages_.begin(), pages_.end(), [](const Page& page) {
    return page.request_holds == 0 && page.ticket_holds == 0;
  }));
}

PageId ModelEngine::Take() {
  size_t best = pages_.size();
  for (size_t i = 0; i < pages_.size(); ++i) {
    const Page& page = pages_[i];
    if (page.request_holds > 0 || page.ticket_holds > 0) continue;
    if (best == pages_.size() || page.used_at < pages_[best].used_at) best = i;
  }
  MR_CHECK(best < pages_.size(), "no page is free");
  if (const uint64_t key = std::exchange(pages_[best].key, 0); key != 0) cache_.erase(key);
  pages_[best].used_at = ++uses_;
  return static_cast<PageId>(best);
}

void ModelEngine::Hold(const Pages& pages, int Page::*kind, int by) {
  for (const PageId page : pages) {
    int& holds = pages_[static_cast<size_t>(page)].*kind;
    holds += by;
    MR_CHECK(holds >= 0);
  }
}

// In order of arrival, while pages suffice for all that a request may come to need.
void ModelEngine::Admit() {
  for (auto& [id, s] : sequences_) {
    if (s.admitted) continue;
    const Pages cached = Cached(s);
    int32_t loose = 0;  // cached pages that nobody holds: they are free, and will not be
    for (const PageId page : cached) {
      const Page& p = pages_[static_cast<size_t>(page)];
      loose += p.request_holds == 0 && p.ticket_holds == 0;
    }
    const int32_t needed = AllPages(s) - static_cast<int32_t>(cached.size());
    if (needed > FreePages() - loose - reserved_) break;
    s.admitted = true;
    s.pages = cached;
    s.cached = static_cast<int32_t>(cached.size());
    s.computed = s.cached * kPageTokens;
    s.reserved = needed;
    reserved_ += needed;
    Hold(cached, &Page::request_holds, 1);
    Begin(id, &s);
  }
  ScheduleStep();
}

void ModelEngine::Begin(RequestId id, Sequence* s) {
  if (s->kind == Kind::kImport) return AnswerGrants(id, s);
  Pages taken;
  for (; s->reserved > 0; --s->reserved, --reserved_) {
    taken.push_back(Take());
    Hold({taken.back()}, &Page::request_holds, 1);
  }
  s->pages.insert(s->pages.end(), taken.begin(), taken.end());
  if (s->kind != Kind::kPrefill) return;
  Hold(s->pages, &Page::ticket_holds, 1);
  tickets_[id] = s->pages;
  if (s->cached == 0) return;
  for (int32_t layer = 0; layer < layout_.num_layers; ++layer)
    s->prefill->OnLayer(layer, 0, std::span(s->pages).first(static_cast<size_t>(s->cached)));
}

void ModelEngine::Grant(RequestId id, int32_t num_pages, GrantCallback callback) {
  thread_->Post([this, id, num_pages, callback = std::move(callback)]() mutable {
    Sequence* const s = Find(id);
    if (s == nullptr || s->kind != Kind::kImport)
      return std::move(callback)(Cancelled("the request has ended"));
    s->grants.push_back({num_pages, std::move(callback)});
    if (s->admitted) AnswerGrants(id, s);
  });
}

void ModelEngine::AnswerGrants(RequestId id, Sequence* s) {
  for (Wanted& wanted : std::exchange(s->grants, {})) {
    const auto first = static_cast<int32_t>(s->pages.size());
    Pages pages;
    while (static_cast<int32_t>(pages.size()) < wanted.count &&
           first + static_cast<int32_t>(pages.size()) < PromptPages(*s)) {
      pages.push_back(Take());
      Hold({pages.back()}, &Page::request_holds, 1);
      --s->reserved;
      --reserved_;
    }
    Hold(pages, &Page::ticket_holds, 1);
    s->pages.insert(s->pages.end(), pages.begin(), pages.end());
    Pages& ticket = tickets_[id];
    ticket.insert(ticket.end(), pages.begin(), pages.end());
    std::move(wanted.callback)(engine::GrantedPages{first, std::move(pages)});
  }
}

void ModelEngine::FinishImport(RequestId id, engine::SampledToken first, bool first_already_sent,
                               std::vector<float> /*mtp_hidden*/) {
  thread_->Post([this, id, first, first_already_sent] {
    Sequence* const s = Find(id);
    if (s == nullptr) return;
    MR_CHECK(first_already_sent && s->kind == Kind::kImport &&
             static_cast<int32_t>(s->pages.size()) == PromptPages(*s));
    s->joined = true;
    s->computed = s->text.size();
    for (; s->reserved > 0; --s->reserved, --reserved_) {
      s->pages.push_back(Take());
      Hold({s->pages.back()}, &Page::request_holds, 1);
    }
    s->text.Push(first.token);
    ScheduleStep();
  });
}

void ModelEngine::ImportToGenerate(RequestId id) {
  thread_->Post([this, id] {
    Sequence* const s = Find(id);
    if (s == nullptr) return;
    reserved_ -= std::exchange(s->reserved, 0);
    Hold(s->pages, &Page::request_holds, -1);
    s->pages.clear();
    s->kind = Kind::kGenerate;
    s->admitted = false;
    Admit();
  });
}

void ModelEngine::Cancel(RequestId id) {
  if (bugs_.forgets_cancel) return;
  thread_->Post([this, id] {
    if (Find(id) != nullptr) Fail(id, Cancelled("cancelled"));
  });
}

void ModelEngine::ReleaseTicket(RequestId id) {
  thread_->Post([this, id] {
    const auto found = tickets_.find(id);
    if (found == tickets_.end()) return;
    Hold(found->second, &Page::ticket_holds, -1);
    tickets_.erase(found);
    Admit();
  });
}

engine::EngineStats ModelEngine::Stats() const {
  engine::EngineStats stats;
  stats.pages_total = layout_.num_pages;
  stats.pages_free = FreePages();
  for (const auto& [id, s] : sequences_) ++(s.admitted ? stats.running : stats.waiting);
  stats.tickets = static_cast<int32_t>(tickets_.size());
  return stats;
}

void ModelEngine::ScheduleStep() {
  if (step_planned_) return;
  const bool work = std::any_of(sequences_.begin(), sequences_.end(), [](const auto& entry) {
    return entry.second.admitted && (entry.second.kind != Kind::kImport || entry.second.joined);
  });
  if (!work) return;
  step_planned_ = true;
  thread_->PostAt(thread_->Now() + microseconds((stalled ? 50'000 : 500) + random_->Below(3000)),
                  [this] { Step(); });
}

// A chunk of a prompt or a token of an answer for each.
void ModelEngine::Step() {
  step_planned_ = false;
  std::vector<RequestId> ids;
  for (const auto& [id, s] : sequences_) ids.push_back(id);
  for (const RequestId id : ids) {
    if (!stalled) Advance(id);
  }
  Admit();
}

void ModelEngine::Advance(RequestId id) {
  Sequence* const s = Find(id);
  if (thread_->Now() > s->request.deadline) return Fail(id, DeadlineExceeded("the request's time is up"));
  if (!s->admitted || (s->kind == Kind::kImport && !s->joined)) return;
  if (s->computed < s->text.size()) Chunk(s);
  if (s->computed == s->text.size()) Draw(id, s);
}

void ModelEngine::Chunk(Sequence* s) {
  const int32_t first = s->computed;
  s->computed = std::min(s->text.size(), (first / kPageTokens) * kPageTokens + kChunkTokens);
  for (int32_t layer = 0; layer < layout_.num_layers; ++layer) {
    s->text.Fill(layout_, memory_, s->pages, layer, first, s->computed);
    if (s->prefill == nullptr) continue;
    const auto begin = static_cast<size_t>(first / kPageTokens);
    const auto end = static_cast<size_t>(engine::PagesFor(s->computed));
    s->prefill->OnLayer(layer, static_cast<int32_t>(begin), std::span(s->pages).subspan(begin, end - begin));
  }
}

void ModelEngine::Draw(RequestId id, Sequence* s) {
  const engine::SamplingParams& sampling = s->request.sampling;
  const int32_t index = s->text.size() - static_cast<int32_t>(s->request.prompt.size());
  const uint64_t seed = sampling.seed + (bugs_.draws_by_process ? process_ : 0);
  const ModelDraw draw =
      DrawFrom(layout_, memory_, s->pages, s->text.size(), seed, index, sampling.max_tokens);
  engine::TokenEvent event{index, {draw.token, 0, {}}, draw.finish};
  event.cached_tokens = s->cached * kPageTokens;
  s->sink->OnToken(event);
  if (s->kind == Kind::kPrefill || draw.finish != engine::FinishReason::kNone) return End(id);
  s->text.Push(draw.token);
}

void ModelEngine::Fail(RequestId id, const Status& status) {
  Find(id)->sink->OnError(status);
  End(id);
}

void ModelEngine::End(RequestId id) {
  Sequence* const s = Find(id);
  for (Wanted& wanted : std::exchange(s->grants, {}))
    std::move(wanted.callback)(Cancelled("the request has ended"));
  reserved_ -= s->reserved;
  Hold(s->pages, &Page::request_holds, -1);
  int32_t good = s->computed / kPageTokens;
  if (bugs_.caches_unproven)
    good = std::min<int32_t>(s->text.size() / kPageTokens, static_cast<int32_t>(s->pages.size()));
  for (int32_t i = 0; i < good; ++i) {
    const PageId page = s->pages[static_cast<size_t>(i)];
    if (cache_.try_emplace(s->text.KeyOf((i + 1) * kPageTokens), page).second)
      pages_[static_cast<size_t>(page)].key = s->text.KeyOf((i + 1) * kPageTokens);
  }
  sequences_.erase(id);
  Admit();
}

}  // namespace millrace::sim
