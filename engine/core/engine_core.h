#pragma once
// The engine without its thread: commands go in, Step computes, sinks hear. Engine thread only, all of it.
//
// engine_core.cc   the life of a request: submit, import, cancel, end, tickets
// admission.cc     who gets pages: admission, grants, growth, preemption
// prefix.cc        what of a sequence the prefix cache has, and what it gets; its lower tiers
// step.cc          one step: expire, schedule, forward, sample
// speculate.cc     the MTP layer: drafts and what they need

#include <memory>
#include <span>
#include <unordered_map>
#include <vector>

#include "base/clock.h"
#include "engine/core/engine.h"
#include "engine/core/sequence.h"
#include "engine/kv/cache_log.h"
#include "engine/kv/page_tiers.h"
#include "engine/kv/prefix_cache.h"
#include "engine/scheduler/scheduler.h"
#include "engine/scheduler/speculation.h"
#include "engine/scheduler/step_budget.h"

namespace millrace::engine {

// InvalidArgument, with both numbers, if the request can never run on such an engine. Pure.
Status CheckRequest(const EngineRequest& request, const EngineOptions& options, const ModelConfig& config,
                    const KvLayout& layout);

class EngineCore : private PageCopier {
 public:
  // Borrows `backend`. `file` is the lowest tier of the prefix cache, or null.
  EngineCore(const EngineOptions& options, Backend* backend, std::unique_ptr<PageFile> file = nullptr);

  // The commands of Engine, which says what they mean. The request has passed CheckRequest.
  void Submit(SequenceRole role, EngineRequest request, std::unique_ptr<TokenSink> sink,
              PrefillSink* prefill_sink);
  void Grant(RequestId id, int32_t num_pages, Engine::GrantCallback callback);
  void FinishImport(RequestId id, SampledToken first, bool first_already_sent,
                    std::vector<float> mtp_hidden = {});
  void ImportToGenerate(RequestId id);
  void Cancel(RequestId id);
  void ReleaseTicket(RequestId id);

  // A step in two halves. Prepare ends expired requests, hands out pages and picks the batch; false when
  // there is nothing to run: only a command or a deadline can change that. Run computes what Prepare has just
  // picked. An error of the backend ends every request with it and comes back from this and every later call.
  bool Prepare();
  Status Run();
  // Instead of Run, when Prepare had nothing: takes part in a step of the backend's group.
  Status Join();
  void EndAll(const Status& status);
  bool broken() const { return !broken_.ok(); }  // the backend has failed

  TimePoint NextDeadline() const;  // of the live requests; kNoDeadline when none has one
  bool waits_for_file() const { return tiers_ != nullptr && tiers_->busy(); }
  const CacheLog& cache_log() const { return cache_log_; }
  EngineStats Stats() const;
  int32_t num_queued() const { return static_cast<int32_t>(queued_.size()); }  // what waiting_max bounds
  int32_t last_batch_tokens() const { return last_batch_tokens_; }
  // Page tables and tickets against the pool. For tests; ends the process at the first mismatch.
  void CheckInvariants() const;

 private:
  // Life of a request.
  Sequence* Find(RequestId id);
  void Move(Sequence* sequence, SequenceState state);
  void End(Sequence* sequence, const Status& status);  // OnError
  void Erase(Sequence* sequence);
  bool AppendToken(Sequence* sequence, SampledToken token, bool send);
  void FailGrants(Sequence* sequence, const Status& status);
  SequenceSet& SetOf(SequenceState state);

  // Pages.
  void HandOutPages();
  bool Allocate(Sequence* sequence, int32_t count);
  void DropPages(Sequence* sequence);
  bool AdmitQueued(Sequence* sequence);
  bool AnswerGrant(Sequence* sequence);
  bool GrantIsSafe(const Sequence& sequence, std::span<CachedPage* const> found, int32_t count) const;
  std::vector<CachedPage*> FindCached(Sequence* sequence) const;
  int32_t AvailableBeside(std::span<CachedPage* const> found) const;
  void TakeCached(Sequence* sequence, std::span<CachedPage* const> found);
  void CachePages(Sequence* sequence);
  void HoldForTicket(Sequence* sequence, PageId page);

  // Lower tiers.
  bool CopyOut(PageId page, std::span<std::byte> into) override;
  bool CopyIn(PageId page, std::span<const std::byte> from) override;
  bool Pays(double seconds_per_page) const;
  void BeginFetch(Sequence* sequence);
  bool Fetching(const Sequence& sequence) const;
  int32_t GrowthReserve() const;
  void GrowRunning();
  bool Grow(Sequence* sequence);
  Sequence* PreemptionVictim() const;
  void Preempt(Sequence* sequence);

  // Step.
  void Expire();
  void BuildBatch();
  void AddRun(Sequence* sequence, int32_t num_tokens);
  bool MayDraft(const Sequence& sequence) const;
  void DrawTokens(const StepOutput& output);
  void DrawRun(size_t run, const StepOutput& output);
  bool TakeTokens(size_t run, const StepOutput& output);
  void ScorePrompt(Sequence* sequence, const Segment& segment, std::span<const float> logits);
  int64_t SamplingWork(size_t num_rows) const;
  void KeepHidden(Sequence* sequence, std::span<const float> rows);
  Status DraftNext(std::span<Sequence* const> sequences);
  Status RunBatch();
  void Break(const Status& status);
  void TellLayer(int32_t layer);
  void TellCached(Sequence* sequence);

  const EngineOptions options_;
  Backend* const backend_;
  const KvLayout layout_;
  CacheLog cache_log_;
  std::unique_ptr<PageTiers> tiers_;  // null without lower tiers
  PrefixCache cache_;                 // and the pool of pages below it
  StepCost step_cost_;
  const bool has_mtp_;  // speculation is on and possible
  SpeculationGauge speculation_;
  Status copy_error_;  // of the backend, while pages moved between tiers

  std::unordered_map<RequestId, std::unique_ptr<Sequence>>
      sequences_;  // all live ones; each is in one set below
  SequenceSet queued_;
  SequenceSet importing_;
  SequenceSet running_;
  // Pages with a ticket hold. An entry appears with the first such page and goes at ReleaseTicket, whether
  // its request lives or not.
  std::unordered_map<RequestId, std::vector<PageId>> tickets_;
  int64_t next_arrival_ = 0;

  Batch batch_;
  std::vector<Sequence*> runs_;                    // the sequence of each of the batch's segments
  std::vector<std::vector<int32_t>> next_tokens_;  // of each of them, for the MTP layer
  std::vector<size_t> first_rows_;                 // of each of them, in the step's logits
  std::vector<std::vector<SampledToken>> draws_;   // after each of them; reused
  bool drafting_ = false;                          // in this step
  int32_t num_drafts_ = 0;                         // in this step
  int32_t num_logits_ = 0;                         // in this step
  int32_t last_batch_tokens_ = 0;
  Status broken_;  // the backend's error
  uint64_t steps_ = 0;
  uint64_t prompt_tokens_ = 0;
  uint64_t output_tokens_ = 0;
  uint64_t preemptions_ = 0;
  uint64_t cache_asked_tokens_ = 0;
  uint64_t cache_found_tokens_ = 0;
  uint64_t drafted_tokens_ = 0;
  uint64_t accepted_tokens_ = 0;
};

}  // namespace millrace::engine
