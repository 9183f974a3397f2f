#pragma once
// An engine without a model, in virtual time. The KV rows of a token are a pure function of the tokens up to
// it, and a token of the answer is a pure function of the rows that lie in the sequence's pages, the seed and
// its number: so a byte that is wrong, missing or moved changes the answer, and an answer that goes on
// elsewhere is the same. Pages have two kinds of holder, requests are admitted in order while pages suffice,
// and full pages stay cached, as engine.h says.

#include <map>
#include <memory>
#include <string>
#include <vector>

#include "base/random.h"
#include "engine/core/engine.h"
#include "server/rpc/task_runner.h"

namespace millrace::sim {

// A sequence of tokens, and what its KV is.
class ModelText {
 public:
  ModelText() = default;
  explicit ModelText(const std::vector<int32_t>& tokens);
  void Push(int32_t token);
  int32_t size() const { return static_cast<int32_t>(chain_.size()); }
  // Names the first `tokens` tokens, and nothing else.
  uint64_t KeyOf(int32_t tokens) const { return chain_[static_cast<size_t>(tokens) - 1]; }
  // Writes the rows of tokens [first, last) of one layer to their places in `pages` of `memory`.
  void Fill(const engine::KvLayout& layout, std::span<std::byte> memory,
            std::span<const engine::PageId> pages, int32_t layer, int32_t first, int32_t last) const;

 private:
  std::vector<uint64_t> chain_;
};

struct ModelDraw {
  int32_t token = 0;
  engine::FinishReason finish = engine::FinishReason::kNone;
};
// Token `index` of an answer from the rows of the `tokens` tokens before it.
ModelDraw DrawFrom(const engine::KvLayout& layout, std::span<const std::byte> memory,
                   std::span<const engine::PageId> pages, int32_t tokens, uint64_t seed, int32_t index,
                   int32_t max_tokens);
engine::KvLayout ModelLayout(int32_t num_pages);
// The answer of an undisturbed engine.
std::vector<ModelDraw> ModelAnswer(const std::vector<int32_t>& prompt, uint64_t seed, int32_t max_tokens);

struct EngineBugs {
  bool caches_unproven = false;   // pages of an import that failed are kept as if they were good
  bool forgets_cancel = false;    // a cancelled request goes on
  bool draws_by_process = false;  // what is drawn depends on more than seed and number
};

// Everything on one thread of its process.
class ModelEngine final : public engine::Engine {
 public:
  ModelEngine(server::TaskRunner* thread, Random* random, int32_t num_pages, const EngineBugs& bugs);

  bool stalled = false;  // no step ends
  bool TicketHolds(engine::PageId page) const { return pages_[static_cast<size_t>(page)].ticket_holds > 0; }
  // "" when nothing runs and nobody holds anything, else what is left.
  std::string Left() const;

  Status Generate(engine::EngineRequest request, std::unique_ptr<engine::TokenSink> sink) override;
  Status Prefill(engine::EngineRequest request, std::unique_ptr<engine::PrefillSink> sink) override;
  Status BeginImport(engine::EngineRequest request, std::unique_ptr<engine::TokenSink> sink) override;
  void Grant(engine::RequestId id, int32_t num_pages, GrantCallback callback) override;
  void FinishImport(engine::RequestId id, engine::SampledToken first, bool first_already_sent,
                    std::vector<float> mtp_hidden) override;
  void ImportToGenerate(engine::RequestId id) override;
  void Cancel(engine::RequestId id) override;
  void ReleaseTicket(engine::RequestId id) override;
  engine::EngineStats Stats() const override;
  engine::CacheChanges CacheChangesSince(uint64_t) const override { return {}; }
  bool MakingProgress(Duration) const override { return !stalled; }
  const engine::ModelConfig& config() const override { return config_; }
  const engine::KvLayout& kv_layout() const override { return layout_; }
  std::span<std::byte> kv_memory() override { return memory_; }
  std::string Describe() const override { return "model of an engine"; }

 private:
  enum class Kind { kGenerate, kPrefill, kImport };
  using Pages = std::vector<engine::PageId>;
  struct Page {
    int request_holds = 0;
    int ticket_holds = 0;
    uint64_t key = 0;      // of the prefix cache; 0 = not cached
    uint64_t used_at = 0;  // for the oldest to be forgotten first
  };
  struct Wanted {
    int32_t count = 0;
    GrantCallback callback;
  };
  struct Sequence {
    engine::EngineRequest request;
    std::unique_ptr<engine::TokenSink> sink;
    engine::PrefillSink* prefill = nullptr;  // of a kPrefill: the sink
    Kind kind = Kind::kGenerate;
    ModelText text;
    bool admitted = false;
    bool joined = false;   // an import whose KV is here
    Pages pages;           // held by the request
    int32_t reserved = 0;  // pages that are kept for it
    int32_t cached = 0;    // pages that the prefix cache had
    int32_t computed = 0;  // tokens whose rows are in the pages
    std::vector<Wanted> grants;
  };

  Status Add(engine::EngineRequest request, std::unique_ptr<engine::TokenSink> sink,
             engine::PrefillSink* prefill, Kind kind);
  Sequence* Find(engine::RequestId id);
  int32_t PromptPages(const Sequence& s) const;
  int32_t AllPages(const Sequence& s) const;
  Pages Cached(const Sequence& s) const;
  int32_t FreePages() const;
  engine::PageId Take();
  void Hold(const Pages& pages, int Page::*kind, int by);
  void Admit();
  void Begin(engine::RequestId id, Sequence* s);
  void AnswerGrants(engine::RequestId id, Sequence* s);
  void ScheduleStep();
  void Step();
  void Advance(engine::RequestId id);
  void Chunk(Sequence* s);
  void Draw(engine::RequestId id, Sequence* s);
  void Fail(engine::RequestId id, const Status& status);
  void End(engine::RequestId id);

  server::TaskRunner* const thread_;
  Random* const random_;
  const EngineBugs bugs_;
  const uint64_t process_;  // another one in each
  engine::KvLayout layout_;
  engine::ModelConfig config_;
  std::vector<std::byte> memory_;
  std::vector<Page> pages_;
  std::map<uint64_t, engine::PageId> cache_;
  uint64_t uses_ = 0;
  int32_t reserved_ = 0;
  std::map<engine::RequestId, Sequence> sequences_;
  std::map<engine::RequestId, Pages> tickets_;
  bool step_planned_ = false;
};

}  // namespace millrace::sim
