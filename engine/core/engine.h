#pragma once
// The engine of one worker: turns tokens into tokens over KV pages. It never hears of peers, JSON or sockets.
//
// One thread, the engine thread, owns the scheduler, the pages and the sequences. Every public method may be
// called from any thread: it posts a command and returns. The queue of requests is bounded by waiting_max;
// the commands about a live request are never refused, because their callers send a bounded number of them.
// Sinks and grant callbacks run on the engine thread; they must not block, and may call these methods.
//
// A request lives in one of three ways:
//   Generate  prefill and decode here.
//   Prefill   compute the prompt's KV and the first token here, for somebody else to decode (the P side).
//   Import    reserve pages for a prompt whose KV comes from elsewhere, then decode here (the D side).
//
// A page has two kinds of holder, the request and the ticket (a transfer that may still touch the memory),
// and is free only when both let go. The request lets go when it ends or is cancelled; the ticket only
// through ReleaseTicket. The ticket holds every page of a Prefill and every granted page from the moment it
// is allocated. The owner of a Prefill or an Import calls ReleaseTicket once, at the very end, whatever
// became of the request.
//
// Requests are admitted in order of (priority, arrival) while pages suffice for all that they have to compute
// and a page to grow into. When a growing answer finds no page, the lowest-ranking sequence whose pages no
// ticket holds gives up its own and is computed again later; its client notices nothing but time.

#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "absl/functional/any_invocable.h"
#include "base/clock.h"
#include "base/metrics.h"
#include "base/status.h"
#include "engine/backend/backend.h"
#include "engine/kv/cache_log.h"
#include "engine/kv/page_tiers.h"
#include "engine/sampling/params.h"

namespace millrace::engine {

using RequestId = uint64_t;  // unique within one engine's lifetime; drawn by the caller

enum class FinishReason { kNone, kStop, kLength };

struct EngineRequest {
  RequestId id = 0;
  std::vector<int32_t> prompt;  // at least one token
  // Tokens of the answer that already exist (a continuation after another worker was lost): part of the KV to
  // build, counted as output for sampling, penalties and max_tokens.
  std::vector<int32_t> output;
  SamplingParams sampling;
  TimePoint deadline = kNoDeadline;
  int32_t priority = 0;    // higher first
  std::string cache_salt;  // KV is shared only among requests of one salt
};

// Rows of logits that one step may have beside one per running sequence: of a prompt whose log-probabilities
// are wanted.
inline constexpr int32_t kScoredRowsMax = kPageTokens;

struct TokenEvent {
  int32_t index = 0;  // number of this token in the answer, gap-free from output.size() at submission; an
                      // import's first token that was already sent is not said again and leaves a gap there
  SampledToken token;
  FinishReason finish = FinishReason::kNone;  // not kNone on the last token
  // Of a prefill with an MTP layer: the last row's final hidden state, [hidden_size].
  std::vector<float> mtp_hidden = {};
  // With the first token of an answer whose sampling says prompt_logprobs: the prompt's tokens but the first.
  std::vector<SampledToken> prompt = {};
  int32_t cached_tokens = 0;  // with the first token: how many of the prompt were found in the prefix cache
};

// Receives one request's results. Engine thread. Exactly one of a finishing OnToken or OnError ends it; after
// that, or after Cancel's own OnError(kCancelled), nothing more is called and the sink is destroyed. Errors:
// kCancelled, kDeadlineExceeded, kResourceExhausted when the answer outgrew the whole KV memory,
// kFailedPrecondition or kInvalidArgument when the request was misused, otherwise the backend's own: then the
// process cannot go on computing.
class TokenSink {
 public:
  virtual ~TokenSink() = default;
  virtual void OnToken(const TokenEvent& event) = 0;
  virtual void OnError(const Status& status) = 0;
};

// The P side's sink. OnLayer: the KV of pages [first_page, first_page + pages.size()) of this sequence
// (indices into its page table; `pages` are their ids) is final for `layer`. What the prefix cache had comes
// like a chunk, at admission. All layers of a chunk come before the next chunk; the last chunk's last page
// may be part full. After the last OnLayer comes OnToken with the first token; it ends the request, whether
// the answer itself ends with it (finish) or goes on elsewhere (kNone), but the pages stay held by the ticket
// until ReleaseTicket.
class PrefillSink : public TokenSink {
 public:
  virtual void OnLayer(int32_t layer, int32_t first_page, std::span<const PageId> pages) = 0;
};

struct EngineOptions {
  int32_t batch_tokens_max = 512;  // token budget of one step; more than kPageTokens
  int32_t running_max = 64;   // sequences in prefill or decode, and imports that hold pages; at most what
                              // batch_tokens_max leaves beside PrefillShare
  int32_t waiting_max = 256;  // requests queued; one more is ResourceExhausted
  int32_t num_vocabulary_tokens = 0;  // ids below this have a token (the tokenizer's size)
  bool prefix_cache = true;           // keep the KV of full pages for later requests that begin alike
  std::string model_digest;           // part of the cache's keys
  // Where cached pages go when the pool needs their room; 0 = forgotten at once. The file needs host memory
  // too.
  size_t host_tier_bytes = 0;
  size_t disk_tier_bytes = 0;
  std::string disk_tier_directory;
  // While answers are being made, prompts take no more of a step than this allows (but a page): the longest
  // that an answer should wait between two tokens. 0 = whole batches.
  Duration token_gap_target = Duration(0);
  // Let the MTP layer, if the backend has one, propose a token that the next step verifies. The answer is the
  // same; it is used where it measures faster.
  bool speculate = false;
  const Clock* clock = &Clock::System();
};

struct EngineStats {
  int32_t pages_total = 0;
  int32_t pages_free = 0;         // that can be had at once: nobody holds them, or only the prefix cache
  int32_t pages_cached = 0;       // of the free ones, those with content in the prefix cache
  int32_t pages_ticket_only = 0;  // held by a ticket whose request has ended
  int32_t waiting = 0;            // queued requests, import waits for pages included
  int32_t running = 0;            // sequences in prefill or decode
  int32_t importing = 0;          // imports between BeginImport and FinishImport
  int32_t tickets = 0;            // requests whose ticket holds pages
  uint64_t steps = 0;
  uint64_t prompt_tokens = 0;  // computed
  uint64_t output_tokens = 0;
  uint64_t preemptions = 0;
  uint64_t cache_asked_tokens = 0;  // tokens of admitted requests that the prefix cache was asked for
  uint64_t cache_found_tokens = 0;  // of these, tokens whose KV it had
  TierStats tiers;
  uint64_t drafted_tokens = 0;   // proposed by the MTP layer and verified
  uint64_t accepted_tokens = 0;  // of these, those that sampling drew
};

// What an import is given: the next pages of its sequence.
struct GrantedPages {
  int32_t first_page =
      0;  // index in the sequence of pages[0]; of a first grant, the pages that were cached here
  std::vector<PageId> pages;  // held by request and ticket; to be written
};

class Engine {
 public:
  // Starts the engine thread. `metrics` may be null; otherwise it outlives the engine. InvalidArgument for
  // options that cannot work.
  static StatusOr<std::unique_ptr<Engine>> Create(const EngineOptions& options,
                                                  std::unique_ptr<Backend> backend, Metrics* metrics);
  // Fails what is left with kCancelled, joins the thread. No transfer may touch the KV memory any more, and
  // no other thread calls the engine.
  virtual ~Engine() = default;

  // All three: InvalidArgument when the request can never run (too long for the context or the pool, token
  // out of range); ResourceExhausted when the queue is full. On error the sink is destroyed uncalled. An id
  // that is in use, by a request or a ticket, shows as the sink's OnError.
  virtual Status Generate(EngineRequest request, std::unique_ptr<TokenSink> sink) = 0;
  virtual Status Prefill(EngineRequest request, std::unique_ptr<PrefillSink> sink) = 0;
  virtual Status BeginImport(EngineRequest request, std::unique_ptr<TokenSink> sink) = 0;

  using GrantCallback = absl::AnyInvocable<void(StatusOr<GrantedPages>) &&>;
  // Import: the next `num_pages` pages of this sequence, held by request and ticket. Answers (engine thread)
  // when they are there, or with an error once the request has ended or its ticket is released. Grants of one
  // request are answered in order; those of an import add up to PagesFor(prompt + output) at most, and are
  // given so that imports that wait for each other's pages can all complete. The first grant begins after the
  // pages that the prefix cache has; it and later ones give fewer pages than asked for, or none, where the
  // sequence needs no more. The last page of a sequence is always granted.
  virtual void Grant(RequestId id, int32_t num_pages, GrantCallback callback) = 0;
  // Import: the KV of prompt and earlier output is in cached and granted pages (all PagesFor of them;
  // FailedPrecondition to the sink otherwise), and `first` is the token that P sampled from it. The sequence
  // joins the running batch; the sink gets OnToken(first) first unless `first_already_sent`. A first token
  // that ends the answer is always said, with its finish, so that every request has exactly one end.
  // `mtp_hidden` is what P's token came with, for the MTP layer's row of the last token; empty: no
  // speculation for this answer.
  virtual void FinishImport(RequestId id, SampledToken first, bool first_already_sent,
                            std::vector<float> mtp_hidden = {}) = 0;
  // Import whose KV will not come from elsewhere after all: becomes a Generate. Its granted pages stay with
  // the ticket until ReleaseTicket, the request gets new ones.
  virtual void ImportToGenerate(RequestId id) = 0;

  // The request ends now: its sink gets OnError(kCancelled) unless it has ended; its hold on pages goes.
  // Unknown ids are ignored. The ticket's hold stays.
  virtual void Cancel(RequestId id) = 0;
  // No transfer of this request can touch its pages any more: the ticket's hold goes, for good. Grants that
  // wait are answered with an error, OnLayer is not called any more. Unknown ids are ignored. The request
  // itself goes on.
  virtual void ReleaseTicket(RequestId id) = 0;

  virtual EngineStats Stats() const = 0;  // a recent snapshot
  // What has come into the prefix cache, any tier of it, and gone since `position`. Any thread.
  virtual CacheChanges CacheChangesSince(uint64_t position) const = 0;
  // For a watchdog; does not depend on the engine thread. False if that thread has been in one turn
  // (commands, one step, sinks) for longer than stall_max, has not taken a command for as long, or if the
  // backend has failed. Waiting for pages that a ticket holds is no stall.
  virtual bool MakingProgress(Duration stall_max) const = 0;
  virtual const ModelConfig& config() const = 0;
  virtual const KvLayout& kv_layout() const = 0;
  virtual std::span<std::byte> kv_memory() = 0;
  virtual std::string Describe() const = 0;
};

}  // namespace millrace::engine
