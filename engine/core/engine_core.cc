#include "engine/core/engine_core.h"

#include <algorithm>
#include <utility>

#include "base/check.h"
#include "engine/kv/page_keys.h"

namespace millrace::engine {
namespace {

// prompt + max_tokens, cut at the context.
int32_t TokensMax(const EngineRequest& request, const ModelConfig& config) {
  const int64_t wanted = static_cast<int64_t>(request.prompt.size()) + request.sampling.max_tokens;
  return static_cast<int32_t>(std::min<int64_t>(wanted, config.max_position));
}

std::vector<int32_t> EndTokens(const SamplingParams& sampling, const ModelConfig& config) {
  std::vector<int32_t> tokens = sampling.stop_token_ids;
  if (!sampling.ignore_eos) {
    tokens.insert(tokens.end(), config.eos_token_ids.begin(), config.eos_token_ids.end());
  }
  return tokens;
}

}  // namespace

Status CheckRequest(const EngineRequest& request, const EngineOptions& options, const ModelConfig& config,
                    const KvLayout& layout) {
  if (request.prompt.empty()) return InvalidArgument("the prompt is empty");
  if (request.sampling.max_tokens < 1) {
    return InvalidArgument("max_tokens is {}; at least 1 is needed", request.sampling.max_tokens);
  }
  if (static_cast<int64_t>(request.output.size()) >= request.sampling.max_tokens) {
    return InvalidArgument("the answer has {} tokens already and max_tokens is {}", request.output.size(),
                           request.sampling.max_tokens);
  }
  const int64_t num_tokens = static_cast<int64_t>(request.prompt.size() + request.output.size());
  if (num_tokens >= config.max_position) {
    return InvalidArgument("the prompt has {} tokens; the model's context of {} leaves no room for an answer",
                           num_tokens, config.max_position);
  }
  if (PagesFor(num_tokens) > layout.num_pages) {
    return InvalidArgument("the prompt has {} tokens; the KV memory holds {}", num_tokens,
                           static_cast<int64_t>(layout.num_pages) * kPageTokens);
  }
  for (const auto* tokens : {&request.prompt, &request.output}) {
    for (const int32_t token : *tokens) {
      if (token < 0 || token >= options.num_vocabulary_tokens) {
        return InvalidArgument("token {} is out of range; the vocabulary has {}", token,
                               options.num_vocabulary_tokens);
      }
    }
  }
  return OkStatus();
}

EngineCore::EngineCore(const EngineOptions& options, Backend* backend, std::unique_ptr<PageFile> file)
    : options_(options),
      backend_(backend),
      layout_(backend->kv_layout()),

      tiers_(options.host_tier_bytes < layout_.page_bytes()
                 ? nullptr
                 : std::make_unique<PageTiers>(
                       layout_.page_bytes(),
                       static_cast<int32_t>(options.host_tier_bytes / layout_.page_bytes()), std::move(file),
                       static_cast<PageCopier*>(this), options.clock)),
      cache_(layout_.num_pages, &cache_log_, tiers_.get()),
      has_mtp_(options.speculate && layout_.num_layers > backend->config().num_layers) {}

Sequence* EngineCore::Find(RequestId id) {
  const auto found = sequences_.find(id);
  return found == sequences_.end() ? nullptr : found->second.get();
}

SequenceSet& EngineCore::SetOf(SequenceState state) {
  if (state == SequenceState::kQueued) return queued_;
  return state == SequenceState::kImporting ? importing_ : running_;
}

void EngineCore::Move(Sequence* sequence, SequenceState state) {
  SetOf(sequence->state).erase(sequence);
  sequence->state = state;
  SetOf(state).insert(sequence);
}

void EngineCore::Submit(SequenceRole role, EngineRequest request, std::unique_ptr<TokenSink> sink,
                        PrefillSink* prefill_sink) {
  if (!broken_.ok()) return sink->OnError(broken_);
  if (sequences_.contains(request.id) || tickets_.contains(request.id)) {
    return sink->OnError(InvalidArgument("request id {} is in use", request.id));
  }
  auto owned = std::make_unique<Sequence>();
  Sequence& sequence = *owned;
  sequence.role = role;
  sequence.arrival = next_arrival_++;
  sequence.sink = std::move(sink);
  sequence.prefill_sink = prefill_sink;
  sequence.num_prompt = static_cast<int32_t>(request.prompt.size());
  sequence.tokens_max = TokensMax(request, backend_->config());
  sequence.end_tokens = EndTokens(request.sampling, backend_->config());
  sequence.tokens = std::move(request.prompt);
  sequence.tokens.insert(sequence.tokens.end(), request.output.begin(), request.output.end());
  sequence.tokens.reserve(sequence.tokens.size() + 64);
  sequence.num_imported = sequence.num_tokens();
  sequence.cacheable = options_.prefix_cache;
  sequence.cache_root = CacheRoot(options_.model_digest, request.cache_salt);
  sequence.request = std::move(request);
  sequence.request.prompt.clear();
  sequence.request.output.clear();
  sequences_.emplace(sequence.request.id, std::move(owned));
  queued_.insert(&sequence);
  BeginFetch(&sequence);
}

void EngineCore::Grant(RequestId id, int32_t num_pages, Engine::GrantCallback callback) {
  Sequence* sequence = Find(id);
  if (sequence == nullptr) return std::move(callback)(NotFound("request {} has ended", id));
  if (sequence->role != SequenceRole::kImport || sequence->state == SequenceState::kRunning ||
      sequence->ticket_released) {
    return std::move(callback)(FailedPrecondition("request {} imports nothing", id));
  }
  int64_t asked = int64_t{sequence->num_pages()} + num_pages;
  for (const PendingGrant& grant : sequence->grants) asked += grant.num_pages;
  asked -= sequence->num_cached_pages;
  if (num_pages < 1 || asked > PagesFor(sequence->num_imported)) {
    return std::move(callback)(InvalidArgument("{} more pages asked for, {} in all; the prompt needs {}",
                                               num_pages, asked, PagesFor(sequence->num_imported)));
  }
  sequence->grants.push_back({num_pages, std::move(callback)});
}

void EngineCore::FinishImport(RequestId id, SampledToken first, bool first_already_sent,
                              std::vector<float> mtp_hidden) {
  Sequence* sequence = Find(id);
  if (sequence == nullptr) return;
  if (sequence->role != SequenceRole::kImport || sequence->state == SequenceState::kRunning) {
    return End(sequence, FailedPrecondition("request {} imports nothing", id));
  }
  if (sequence->num_pages() != PagesFor(sequence->num_imported)) {
    return End(sequence, FailedPrecondition("{} pages were granted; the prompt needs {}",
                                            sequence->num_pages(), PagesFor(sequence->num_imported)));
  }
  if (first.token < 0 || first.token >= options_.num_vocabulary_tokens) {
    return End(sequence, InvalidArgument("first token {} is out of range; the vocabulary has {}", first.token,
                                         options_.num_vocabulary_tokens));
  }
  // Asked for before it was known how much is cached.
  for (PendingGrant& grant : std::exchange(sequence->grants, {})) {
    std::move(grant.callback)(GrantedPages{sequence->num_pages(), {}});
  }
  const auto imported = std::span(sequence->pages).subspan(static_cast<size_t>(sequence->num_cached_pages));
  if (const Status status = backend_->FromHost(imported); !status.ok()) return Break(status);
  sequence->num_computed = sequence->num_prefill = sequence->num_imported;
  if (has_mtp_ && mtp_hidden.size() == static_cast<size_t>(backend_->config().hidden_size)) {
    sequence->mtp_begin = sequence->num_imported - 1;
    sequence->mtp_hidden = std::move(mtp_hidden);
  }
  Move(sequence, SequenceState::kRunning);
  AppendToken(sequence, std::move(first), /*send=*/!first_already_sent);
}

void EngineCore::ImportToGenerate(RequestId id) {
  Sequence* sequence = Find(id);
  if (sequence == nullptr || sequence->role != SequenceRole::kImport ||
      sequence->state == SequenceState::kRunning) {
    return;
  }
  sequence->role = SequenceRole::kGenerate;
  FailGrants(sequence, FailedPrecondition("request {} generates here", id));
  DropPages(sequence);
  Move(sequence, SequenceState::kQueued);
}

void EngineCore::Cancel(RequestId id) {
  if (Sequence* sequence = Find(id); sequence != nullptr) End(sequence, Cancelled("cancelled"));
}

void EngineCore::ReleaseTicket(RequestId id) {
  if (Sequence* sequence = Find(id); sequence != nullptr) {
    sequence->ticket_released = true;
    FailGrants(sequence, FailedPrecondition("the ticket of request {} is released", id));
  }
  const auto ticket = tickets_.find(id);
  if (ticket == tickets_.end()) return;
  // Backwards, as in DropPages.
  for (auto page = ticket->second.rbegin(); page != ticket->second.rend(); ++page) {
    cache_.Release(*page, PageHolder::kTicket);
  }
  tickets_.erase(ticket);
}

// Callbacks and sinks may only post commands, so that nothing changes here while they run.
void EngineCore::FailGrants(Sequence* sequence, const Status& status) {
  for (PendingGrant& grant : std::exchange(sequence->grants, {})) std::move(grant.callback)(status);
}

// Adds a token to the answer, tells the sink if `send` or if it is the last, and ends the request after its
// last one. False when it has ended; `sequence` is gone then.
bool EngineCore::AppendToken(Sequence* sequence, SampledToken token, bool send) {
  TokenEvent event;
  event.index = sequence->num_output();
  if (event.index == 0) event.prompt = std::move(sequence->prompt_scores);
  if (sequence->num_tokens() == sequence->num_imported) event.cached_tokens = sequence->num_found;
  sequence->tokens.push_back(token.token);
  if (sequence->is_end(token.token)) {
    event.finish = FinishReason::kStop;
  } else if (sequence->num_tokens() >= sequence->tokens_max) {
    event.finish = FinishReason::kLength;
  }
  event.token = std::move(token);
  if (sequence->role == SequenceRole::kPrefill) event.mtp_hidden = std::move(sequence->mtp_hidden);
  if (send || event.finish != FinishReason::kNone) sequence->sink->OnToken(event);
  if (event.finish == FinishReason::kNone && sequence->role != SequenceRole::kPrefill) return true;
  CachePages(sequence);
  Erase(sequence);
  return false;
}

void EngineCore::End(Sequence* sequence, const Status& status) {
  sequence->sink->OnError(status);
  Erase(sequence);
}

void EngineCore::Erase(Sequence* sequence) {
  FailGrants(sequence, NotFound("request {} has ended", sequence->request.id));
  DropPages(sequence);
  SetOf(sequence->state).erase(sequence);
  sequences_.erase(sequence->request.id);
}

void EngineCore::EndAll(const Status& status) {
  while (!sequences_.empty()) End(sequences_.begin()->second.get(), status);
}

TimePoint EngineCore::NextDeadline() const {
  TimePoint next = kNoDeadline;
  for (const auto& [id, sequence] : sequences_) next = std::min(next, sequence->request.deadline);
  return next;
}

EngineStats EngineCore::Stats() const {
  EngineStats stats;
  stats.pages_total = layout_.num_pages;
  stats.pages_free = cache_.num_available();
  stats.pages_cached = cache_.pool().num_cache_only();
  stats.pages_ticket_only = cache_.pool().num_ticket_only();
  stats.running = static_cast<int32_t>(running_.size());
  stats.importing = static_cast<int32_t>(importing_.size());
  for (const Sequence* sequence : queued_) {
    const bool asks = sequence->role != SequenceRole::kImport || !sequence->grants.empty();
    stats.waiting += asks ? 1 : 0;
    stats.importing += sequence->role == SequenceRole::kImport ? 1 : 0;
  }
  for (const Sequence* sequence : importing_) stats.waiting += sequence->grants.empty() ? 0 : 1;
  stats.tickets = static_cast<int32_t>(tickets_.size());
  stats.steps = steps_;
  stats.prompt_tokens = prompt_tokens_;
  stats.output_tokens = output_tokens_;
  stats.preemptions = preemptions_;
  stats.cache_asked_tokens = cache_asked_tokens_;
  stats.cache_found_tokens = cache_found_tokens_;
  stats.drafted_tokens = drafted_tokens_;
  stats.accepted_tokens = accepted_tokens_;
  if (tiers_ != nullptr) stats.tiers = tiers_->Stats();
  return stats;
}

void EngineCore::CheckInvariants() const {
  std::vector<PageHolds> held(static_cast<size_t>(layout_.num_pages));
  for (const auto& [id, sequence] : sequences_) {
    for (const PageId page : sequence->pages) ++held[static_cast<size_t>(page)].request;
    MR_CHECK(sequence->state != SequenceState::kQueued || sequence->pages.empty(),
             "request {} queues with pages", id);
    MR_CHECK(PagesFor(sequence->num_computed) <= sequence->num_pages(), "request {} lacks pages", id);
    MR_CHECK((sequence->num_cached_pages == 0) == (sequence->cached_tail == nullptr));
    const CachedPage* node = sequence->cached_tail;
    for (int32_t i = sequence->num_cached_pages; i > 0; --i, node = node->parent) {
      MR_CHECK(node->page == sequence->pages[static_cast<size_t>(i - 1)], "request {}: page {} of the cache",
               id, i);
    }
    MR_CHECK(node == nullptr);
  }
  for (const auto& [id, pages] : tickets_) {
    for (const PageId page : pages) ++held[static_cast<size_t>(page)].ticket;
  }
  int32_t num_available = 0;
  for (PageId page = 0; page < layout_.num_pages; ++page) {
    const PageHolds& told = cache_.pool().holds(page);
    const PageHolds& counted = held[static_cast<size_t>(page)];
    MR_CHECK(told.request == counted.request && told.ticket == counted.ticket,
             "page {}: {} requests and {} tickets instead of {} and {}", page, told.request, told.ticket,
             counted.request, counted.ticket);
    MR_CHECK(counted.request <= 1 || told.cache == 1, "page {} is shared and not cached", page);
    num_available += counted.none() ? 1 : 0;
  }
  MR_CHECK(num_available == cache_.num_available());
  cache_.CheckInvariants();
  MR_CHECK(queued_.size() + importing_.size() + running_.size() == sequences_.size());
  MR_CHECK(importing_.size() + running_.size() <= static_cast<size_t>(options_.running_max));
}

}  // namespace millrace::engine
