#pragma once
// An engine without a model: the KV of a page is a pure function of the tokens up to it, and the answer is a
// pure function of the KV bytes that lie in the sequence's pages. So a byte that was moved wrongly changes
// the answer.

#include <algorithm>
#include <atomic>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <utility>
#include <vector>

#include "base/check.h"
#include "base/digest.h"
#include "base/random.h"
#include "engine/core/engine.h"
#include "server/rpc/task_thread.h"

namespace millrace::server {

class FakeEngine final : public engine::Engine {
 public:
  static constexpr int32_t kChunkPages = 2;
  static constexpr int32_t kVocabulary = 1000;

  explicit FakeEngine(int32_t num_pages, int32_t head_dim = 4) : thread_("fake engine") {
    layout_ = {.num_layers = 3,
               .num_pages = num_pages,
               .num_kv_heads = 1,
               .head_dim = head_dim,
               .dtype = engine::KvDType::kF32};
    memory_.resize(layout_.total_bytes());
    holds_.resize(static_cast<size_t>(num_pages));
    config_.vocab_size = kVocabulary;
    config_.max_position = 1 << 20;
    Publish();
  }
  ~FakeEngine() override { thread_.Stop(); }

  // Test controls; any thread.
  std::atomic<bool> prefill_paused = false;  // before each chunk
  std::atomic<bool> token_paused = false;    // before the first token
  std::atomic<bool> decode_paused = false;
  std::atomic<bool> grants_paused = false;
  std::atomic<bool> stalled = false;  // as its watchdog sees it
  std::atomic<bool> full = false;     // refuses new requests
  std::atomic<int32_t> first_token_shift = 0;
  engine::CacheLog cache_log;
  std::atomic<int32_t> prefills = 0;  // begun here, for oneself or for others

  Status Generate(engine::EngineRequest request, std::unique_ptr<engine::TokenSink> sink) override {
    return Add(std::move(request), std::move(sink), nullptr, Kind::kGenerate);
  }
  Status Prefill(engine::EngineRequest request, std::unique_ptr<engine::PrefillSink> sink) override {
    engine::PrefillSink* const prefill = sink.get();
    return Add(std::move(request), std::move(sink), prefill, Kind::kPrefill);
  }
  Status BeginImport(engine::EngineRequest request, std::unique_ptr<engine::TokenSink> sink) override {
    return Add(std::move(request), std::move(sink), nullptr, Kind::kImport);
  }

  void Grant(engine::RequestId id, int32_t num_pages, GrantCallback callback) override {
    auto shared = std::make_shared<GrantCallback>(std::move(callback));
    thread_.Post([this, id, num_pages, shared] { TryGrant(id, num_pages, shared); });
  }
  void FinishImport(engine::RequestId id, engine::SampledToken first, bool first_already_sent,
                    std::vector<float> /*mtp_hidden*/) override {
    thread_.Post([this, id, first, first_already_sent] {
      if (Sequence* s = Find(id); s != nullptr) Joined(s, first.token, first_already_sent);
    });
  }
  void ImportToGenerate(engine::RequestId id) override {
    thread_.Post([this, id] {
      Sequence* s = Find(id);
      if (s == nullptr) return;
      Unhold(&s->pages);
      s->kind = Kind::kGenerate;
      Step(id);
    });
  }
  void Cancel(engine::RequestId id) override {
    thread_.Post([this, id] {
      if (Find(id) != nullptr) EndSequence(id, Cancelled("cancelled"));
    });
  }
  void ReleaseTicket(engine::RequestId id) override {
    thread_.Post([this, id] {
      Unhold(&tickets_[id]);
      tickets_.erase(id);
      Publish();
    });
  }
  engine::EngineStats Stats() const override {
    std::lock_guard lock(mutex_);
    return stats_;
  }
  engine::CacheChanges CacheChangesSince(uint64_t position) const override {
    return cache_log.Since(position);
  }
  bool MakingProgress(Duration) const override { return !stalled; }
  const engine::ModelConfig& config() const override { return config_; }
  const engine::KvLayout& kv_layout() const override { return layout_; }
  std::span<std::byte> kv_memory() override { return memory_; }
  std::string Describe() const override { return "fake"; }

 private:
  enum class Kind { kGenerate, kPrefill, kImport };
  struct Sequence {
    engine::EngineRequest request;
    std::unique_ptr<engine::TokenSink> sink;
    engine::PrefillSink* prefill = nullptr;
    Kind kind = Kind::kGenerate;
    std::vector<engine::PageId> pages;
    int32_t computed = 0;  // pages
    uint64_t state = 0;    // digest of the KV
    int32_t next = -1;     // index of the next token; -1 before the first
  };
  using Pages = std::vector<engine::PageId>;

  static int32_t NumPages(const Sequence& s) {
    return engine::PagesFor(static_cast<int64_t>(s.request.prompt.size() + s.request.output.size()));
  }
  Sequence* Find(engine::RequestId id) {
    const auto found = sequences_.find(id);
    return found == sequences_.end() ? nullptr : &found->second;
  }

  Status Add(engine::EngineRequest request, std::unique_ptr<engine::TokenSink> sink,
             engine::PrefillSink* prefill, Kind kind) {
    if (full) return ResourceExhausted("the queue is full");
    auto s = std::make_shared<Sequence>();
    s->request = std::move(request);
    s->sink = std::move(sink);
    s->prefill = prefill;
    s->kind = kind;
    thread_.Post([this, s] {
      const engine::RequestId id = s->request.id;
      sequences_.emplace(id, std::move(*s));
      Publish();
      if (Find(id)->kind != Kind::kImport) Step(id);
    });
    return OkStatus();
  }

  bool Take(int32_t count, Pages* pages) {
    Pages taken;
    for (engine::PageId page = layout_.num_pages - 1; page >= 0 && static_cast<int32_t>(taken.size()) < count;
         --page) {
      if (holds_[static_cast<size_t>(page)] == 0) taken.push_back(page);
    }
    if (static_cast<int32_t>(taken.size()) < count) return false;
    Hold(taken);
    pages->insert(pages->end(), taken.begin(), taken.end());
    Publish();
    return true;
  }
  void Hold(const Pages& pages) {
    for (const engine::PageId page : pages) ++holds_[static_cast<size_t>(page)];
  }
  void Unhold(Pages* pages) {
    for (const engine::PageId page : *pages) {
      MR_CHECK(holds_[static_cast<size_t>(page)] > 0);
      --holds_[static_cast<size_t>(page)];
    }
    pages->clear();
  }
  void Publish() {
    std::lock_guard lock(mutex_);
    stats_.pages_total = layout_.num_pages;
    stats_.pages_free = 0;
    for (const int hold : holds_) stats_.pages_free += hold == 0;
    stats_.running = static_cast<int32_t>(sequences_.size());
    stats_.tickets = static_cast<int32_t>(tickets_.size());
  }

  void Soon(engine::RequestId id) {
    thread_.PostAt(std::chrono::steady_clock::now() + std::chrono::microseconds(500),
                   [this, id] { Step(id); });
  }

  void TryGrant(engine::RequestId id, int32_t count, const std::shared_ptr<GrantCallback>& callback) {
    Sequence* s = Find(id);
    if (s == nullptr || s->kind != Kind::kImport)
      return std::move(*callback)(Cancelled("the request has ended"));
    Pages pages;
    if (grants_paused || !Take(count, &pages)) {
      thread_.PostAt(std::chrono::steady_clock::now() + std::chrono::microseconds(500),
                     [this, id, count, callback] { TryGrant(id, count, callback); });
      return;
    }
    Hold(pages);
    s->pages.insert(s->pages.end(), pages.begin(), pages.end());
    tickets_[id].insert(tickets_[id].end(), pages.begin(), pages.end());
    const int32_t first_page = static_cast<int32_t>(s->pages.size() - pages.size());
    std::move (*callback)(engine::GrantedPages{first_page, std::move(pages)});
  }

  // Prefill by chunks, then one token a step.
  void Step(engine::RequestId id) {
    Sequence* s = Find(id);
    if (s == nullptr) return;
    if (s->next >= 0) return Decode(s);
    if (prefill_paused) return Soon(id);
    if (s->pages.empty()) {
      if (!Take(NumPages(*s), &s->pages)) return Soon(id);
      ++prefills;
      if (s->kind == Kind::kPrefill) {
        Hold(s->pages);
        tickets_[id] = s->pages;
      }
    }
    if (s->computed < NumPages(*s)) {
      Chunk(s);
      return Soon(id);
    }
    if (token_paused) return Soon(id);
    s->state = Digest(*s);
    const int32_t token = (TokenAt(*s, FirstIndex(*s)) + first_token_shift) % kVocabulary;
    if (s->kind == Kind::kPrefill) {
      s->sink->OnToken({FirstIndex(*s), {token, 0, {}}, FinishAt(*s, FirstIndex(*s))});
      return Erase(id);
    }
    Joined(s, token, false);
  }

  void Chunk(Sequence* s) {
    const int32_t first = s->computed;
    const int32_t count = std::min(kChunkPages, NumPages(*s) - first);
    for (int32_t layer = 0; layer < layout_.num_layers; ++layer) {
      for (int32_t page = first; page < first + count; ++page) FillPiece(*s, layer, page);
      if (s->prefill != nullptr) {
        s->prefill->OnLayer(
            layer, first,
            std::span(s->pages).subspan(static_cast<size_t>(first), static_cast<size_t>(count)));
      }
    }
    s->computed += count;
  }

  void FillPiece(const Sequence& s, int32_t layer, int32_t page) {
    std::vector<int32_t> tokens = s.request.prompt;
    tokens.insert(tokens.end(), s.request.output.begin(), s.request.output.end());
    tokens.resize(std::min(tokens.size(), static_cast<size_t>(page + 1) * engine::kPageTokens));
    const uint64_t seed = Xxh3(std::as_bytes(std::span(tokens)), static_cast<uint64_t>(layer));
    std::byte* const piece = memory_.data() + layout_.piece_offset(layer, s.pages[static_cast<size_t>(page)]);
    for (size_t i = 0; i < layout_.piece_bytes() / 8; ++i) {
      const uint64_t word = Mix64(seed + i);
      std::memcpy(piece + 8 * i, &word, 8);
    }
  }

  uint64_t Digest(const Sequence& s) const {
    uint64_t digest = s.request.sampling.seed;
    for (int32_t layer = 0; layer < layout_.num_layers; ++layer) {
      for (const engine::PageId page : s.pages) {
        digest = Xxh3(std::span(memory_).subspan(layout_.piece_offset(layer, page), layout_.piece_bytes()),
                      digest);
      }
    }
    return digest;
  }
  static int32_t FirstIndex(const Sequence& s) { return static_cast<int32_t>(s.request.output.size()); }
  static int32_t TokenAt(const Sequence& s, int32_t index) {
    return static_cast<int32_t>(Mix64(s.state + static_cast<uint64_t>(index)) % kVocabulary);
  }
  static engine::FinishReason FinishAt(const Sequence& s, int32_t index) {
    return index + 1 >= s.request.sampling.max_tokens ? engine::FinishReason::kLength
                                                      : engine::FinishReason::kNone;
  }

  void Joined(Sequence* s, int32_t first, bool sent) {
    const engine::RequestId id = s->request.id;
    s->state = Digest(*s);
    s->next = FirstIndex(*s) + 1;
    if (!sent) {
      const auto finish = FinishAt(*s, s->next - 1);
      s->sink->OnToken({s->next - 1, {first, 0, {}}, finish});
      if (finish != engine::FinishReason::kNone) return Erase(id);
    }
    Soon(id);
  }
  void Decode(Sequence* s) {
    const engine::RequestId id = s->request.id;
    if (decode_paused) return Soon(id);
    const auto finish = FinishAt(*s, s->next);
    s->sink->OnToken({s->next, {TokenAt(*s, s->next), 0, {}}, finish});
    ++s->next;
    if (finish != engine::FinishReason::kNone) return Erase(id);
    Soon(id);
  }
  void EndSequence(engine::RequestId id, const Status& status) {
    Find(id)->sink->OnError(status);
    Erase(id);
  }
  void Erase(engine::RequestId id) {
    Unhold(&Find(id)->pages);
    sequences_.erase(id);
    Publish();
  }

  engine::KvLayout layout_;
  engine::ModelConfig config_;
  std::vector<std::byte> memory_;
  std::vector<int> holds_;
  std::map<engine::RequestId, Sequence> sequences_;
  std::map<engine::RequestId, Pages> tickets_;
  mutable std::mutex mutex_;
  engine::EngineStats stats_;
  TaskThread thread_;
};

}  // namespace millrace::server
