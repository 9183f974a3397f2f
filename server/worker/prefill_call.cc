#include "server/worker/prefill_call.h"

#include <algorithm>
#include <vector>

#include "base/check.h"
#include "server/rpc/convert.h"
#include "server/worker/pieces.h"
#include "server/worker/ticket.h"

namespace millrace::server {
namespace {

// Shared by its stream (until it has ended), the engine's sink, the callbacks of transfers and the tasks on
// their way: it lives until its ticket is released.
class Prefill final : public PrefillCall, public std::enable_shared_from_this<Prefill> {
 public:
  Prefill(WorkerContext* context, std::shared_ptr<CallStream<rpc::PrefillEvent>> stream)
      : context_(context),
        active_(context->active),
        stream_(std::move(stream)),
        ticket_(&context->metrics.exports()) {}

  void OnCommand(const rpc::PrefillCommand& command) override;
  void Abort(const Status& status) override { End(status); }

 private:
  class Sink;
  // One layer of consecutive pages of the sequence that waits for its grant.
  struct Run {
    int32_t layer = 0;
    int32_t first_page = 0;
    int32_t count = 0;
  };

  Status OnStart(const rpc::PrefillCommand::Start& start);
  Status CheckStart(const rpc::PrefillCommand::Start& start) const;
  Status OnGrant(const rpc::PrefillCommand::Grant& grant);
  void OnLayer(int32_t layer, int32_t first_page, const std::vector<engine::PageId>& pages);
  void OnToken(const engine::TokenEvent& event);
  void Flush();
  Status Submit(const Run& run);
  void Digest(const Run& run);
  void OnWritten(const Run& run, const Status& status);
  void OnDigest(uint64_t digest);
  void SayGrantsUsed();
  void SealWhenComplete();
  void End(const Status& status);
  void ReleaseWhenDrained();
  int32_t layers() const { return context_->layout.num_layers; }

  WorkerContext* const context_;
  const ActiveGuard active_;
  // Shared: the carrier needs it until it has ended. At most one event per grant and four others go there.
  // Null at the end.
  std::shared_ptr<CallStream<rpc::PrefillEvent>> stream_;

  bool started_ = false;
  bool computing_ = false;  // the engine has the request
  engine::RequestId id_ = 0;
  TimePoint begun_;
  TimePoint token_at_;            // when the first token was there
  TimePoint first_submitted_at_;  // a write
  TimePoint submitted_at_;        // the last write
  Span span_;
  TimePoint deadline_ = kNoDeadline;
  int32_t priority_ = 0;
  int32_t num_tokens_ = 0;
  int32_t num_pages_ = 0;   // of the sequence
  int32_t first_page_ = 0;  // D has those before it

  engine::KvLayout remote_layout_;  // D's: ours with D's page count
  uint32_t remote_region_ = 0;
  transfer::PeerId peer_ = 0;
  Ticket ticket_;
  transfer::TicketId ticket_id_ = 0;         // D's
  std::vector<engine::PageId> destination_;  // pages granted so far, in sequence order from first_page_ on
  std::vector<int32_t> grant_ends_;          // page index where each grant ends
  std::vector<engine::PageId> source_;       // [num_pages_], filled as computed

  std::vector<Run> waiting_;             // computed, not submitted: at most one per layer and chunk
  std::vector<int32_t> layers_written_;  // [num_pages_] acknowledged layers of each page
  size_t grants_used_ = 0;
  uint32_t pieces_written_ = 0;
  uint64_t digest_ = 0;
  int32_t digests_pending_ = 0;
  bool token_sent_ = false;

  bool ended_ = false;
  bool fenced_ = false;  // after an abort: none of our writes is in flight any more
};

// Engine thread: only posts.
class Prefill::Sink final : public engine::PrefillSink {
 public:
  explicit Sink(std::shared_ptr<Prefill> call) : call_(std::move(call)) {}
  void OnLayer(int32_t layer, int32_t first_page, std::span<const engine::PageId> pages) override {
    call_->context_->control.Post(
        [call = call_, layer, first_page, pages = std::vector<engine::PageId>(pages.begin(), pages.end())] {
          call->OnLayer(layer, first_page, pages);
        });
  }
  void OnToken(const engine::TokenEvent& event) override {
    call_->context_->control.Post([call = call_, event] { call->OnToken(event); });
  }
  void OnError(const Status& status) override {
    call_->context_->control.Post([call = call_, status] { call->End(status); });
  }

 private:
  const std::shared_ptr<Prefill> call_;  // shared: the stream may end first
};

void Prefill::OnCommand(const rpc::PrefillCommand& command) {
  if (ended_) return;
  Status status = InvalidArgument("a command of an unknown kind");
  if (command.kind_case() == rpc::PrefillCommand::kStart) status = OnStart(command.start());
  if (command.kind_case() == rpc::PrefillCommand::kGrant) status = OnGrant(command.grant());
  if (!status.ok()) End(status);
}

Status Prefill::CheckStart(const rpc::PrefillCommand::Start& start) const {
  const WorkerOptions& options = context_->options;
  if (started_) return InvalidArgument("started twice");
  if (context_->draining) return Unavailable("the worker is shutting down");
  if (context_->stalled) return Unavailable("the worker computes no further");
  if (start.protocol_version() != kProtocolVersion) {
    return FailedPrecondition("the caller speaks protocol {}, the worker {}", start.protocol_version(),
                              kProtocolVersion);
  }
  if (context_->role == WorkerRole::kDecode)
    return FailedPrecondition("a decode worker does not prefill for others");
  if (start.request().model_digest() != options.model_digest) {
    return FailedPrecondition("the request is for model {}, the worker has {}",
                              start.request().model_digest(), options.model_digest);
  }
  if (start.layout_hash() != context_->layout_hash) {
    return FailedPrecondition("the KV layouts differ: {:016x} there, {:016x} here", start.layout_hash(),
                              context_->layout_hash);
  }
  if (start.num_pages() == 0 || start.num_pages() > INT32_MAX)
    return InvalidArgument("num_pages: out of range");
  return OkStatus();
}

Status Prefill::OnStart(const rpc::PrefillCommand::Start& start) {
  MR_RETURN_IF_ERROR(CheckStart(start));
  started_ = true;
  begun_ = context_->control.Now();
  span_ = BeginSpan(context_->options.spans, TraceFromProto(start.request()),
                    "millrace.worker.v1.Worker/Prefill", SpanKind::kServer, begun_);
  MR_ASSIGN_OR_RETURN(engine::EngineRequest request,
                      RequestFromProto(start.request(), context_->NextId(), begun_));
  MR_RETURN_IF_ERROR(context_->Constrain(&request.sampling));
  MR_ASSIGN_OR_RETURN(peer_, context_->transfer->Open(start.transfer_descriptor()));
  context_->decode_workers.Note(peer_, start.epoch());
  id_ = request.id;
  deadline_ = request.deadline;
  priority_ = request.priority;
  num_tokens_ = static_cast<int32_t>(request.prompt.size() + request.output.size());
  num_pages_ = engine::PagesFor(num_tokens_);
  if (start.first_page() >= static_cast<uint32_t>(num_pages_)) {
    return InvalidArgument("first_page {}: the prompt has {} pages", start.first_page(), num_pages_);
  }
  first_page_ = static_cast<int32_t>(start.first_page());
  remote_layout_ = context_->layout;
  remote_layout_.num_pages = static_cast<int32_t>(start.num_pages());
  remote_region_ = start.region();
  source_.assign(static_cast<size_t>(num_pages_), -1);
  layers_written_.assign(static_cast<size_t>(num_pages_), 0);
  // Its own pages hold the result: computing does not wait for grants.
  MR_RETURN_IF_ERROR(
      context_->engine->Prefill(std::move(request), std::make_unique<Sink>(shared_from_this())));
  computing_ = true;
  rpc::PrefillEvent event;
  event.mutable_accepted()->set_epoch(context_->transfer->epoch());
  stream_->Write(std::move(event));
  return OkStatus();
}

Status Prefill::OnGrant(const rpc::PrefillCommand::Grant& grant) {
  if (!started_) return InvalidArgument("a grant before the start");
  if (grant.ticket() == 0 || (ticket_id_ != 0 && grant.ticket() != ticket_id_)) {
    return InvalidArgument("a grant under ticket {} instead of {}", grant.ticket(), ticket_id_);
  }
  const int32_t left = num_pages_ - first_page_ - static_cast<int32_t>(destination_.size());
  MR_ASSIGN_OR_RETURN(std::vector<engine::PageId> pages,
                      PagesFromProto(grant, remote_layout_.num_pages, left));
  if (ticket_id_ == 0) ticket_.MoveTo(TicketState::kGranted);
  ticket_id_ = grant.ticket();
  destination_.insert(destination_.end(), pages.begin(), pages.end());
  grant_ends_.push_back(first_page_ + static_cast<int32_t>(destination_.size()));
  Flush();
  return OkStatus();
}

void Prefill::OnLayer(int32_t layer, int32_t first_page, const std::vector<engine::PageId>& pages) {
  if (ended_) return;
  Run run{layer, first_page, static_cast<int32_t>(pages.size())};
  MR_CHECK(layer >= 0 && layer < layers() && first_page >= 0 && run.count > 0 &&
               first_page + run.count <= num_pages_,
           "layer {} of pages {} to {} of {}", layer, first_page, first_page + run.count, num_pages_);
  std::copy(pages.begin(), pages.end(), source_.begin() + first_page);
  const int32_t skipped = std::clamp(first_page_ - first_page, 0, run.count);
  run.first_page += skipped;
  run.count -= skipped;
  if (run.count == 0) return;
  Digest(run);
  waiting_.push_back(run);
  Flush();
}

// Submits what is granted; of a run that is granted in part, that part.
void Prefill::Flush() {
  const int32_t granted = first_page_ + static_cast<int32_t>(destination_.size());
  std::vector<Run> later;
  for (const Run& run : std::exchange(waiting_, {})) {
    Run now = run;
    now.count = std::clamp(granted - run.first_page, 0, run.count);
    if (now.count < run.count)
      later.push_back({run.layer, run.first_page + now.count, run.count - now.count});
    if (now.count == 0) continue;
    if (const Status status = Submit(now); !status.ok()) return End(status);
  }
  waiting_ = std::move(later);
}

Status Prefill::Submit(const Run& run) {
  const auto first = static_cast<size_t>(run.first_page);
  const auto count = static_cast<size_t>(run.count);
  const auto destination = static_cast<size_t>(run.first_page - first_page_);
  transfer::Request write;
  write.ticket = ticket_id_;
  write.intents = LayerIntents(context_->layout, context_->region, std::span(source_).subspan(first, count),
                               remote_layout_, remote_region_,
                               std::span(destination_).subspan(destination, count), run.layer);
  write.deadline = deadline_;
  write.priority = priority_;
  if (ticket_.state() == TicketState::kGranted) ticket_.MoveTo(TicketState::kStreaming);
  submitted_at_ = context_->control.Now();
  if (first_submitted_at_ == TimePoint{}) first_submitted_at_ = submitted_at_;
  return context_->transfer->Submit(peer_, std::move(write), [self = shared_from_this(), run](Status status) {
    self->context_->control.Post([self, run, status] { self->OnWritten(run, status); });
  });
}

// The content is final, so it can be summed up while it waits or travels.
void Prefill::Digest(const Run& run) {
  ++digests_pending_;
  const auto first = source_.begin() + run.first_page;
  context_->digest.Post([self = shared_from_this(), run, num_pages = num_pages_,
                         pages = std::vector<engine::PageId>(first, first + run.count)] {
    WorkerContext& context = *self->context_;
    const uint64_t digest =
        LayerDigest(context.layout, context.kv, pages, run.layer, run.first_page, num_pages);
    context.control.Post([self, digest] { self->OnDigest(digest); });
  });
}

void Prefill::OnDigest(uint64_t digest) {
  --digests_pending_;
  digest_ += digest;
  if (ended_) return ReleaseWhenDrained();
  SealWhenComplete();
}

void Prefill::OnWritten(const Run& run, const Status& status) {
  if (ended_) return;
  if (!status.ok()) return End(Annotate(status, fmt::format("layer {} to the decode worker", run.layer)));
  for (int32_t page = run.first_page; page < run.first_page + run.count; ++page) {
    ++layers_written_[static_cast<size_t>(page)];
  }
  pieces_written_ += static_cast<uint32_t>(run.count);
  context_->metrics.OnTransferred(static_cast<uint64_t>(run.count) * context_->layout.piece_bytes());
  SayGrantsUsed();
  SealWhenComplete();
}

void Prefill::SayGrantsUsed() {
  const size_t before = grants_used_;
  while (grants_used_ < grant_ends_.size()) {
    const auto begin =
        layers_written_.begin() + (grants_used_ == 0 ? first_page_ : grant_ends_[grants_used_ - 1]);
    const auto end = layers_written_.begin() + grant_ends_[grants_used_];
    if (!std::all_of(begin, end, [this](int32_t written) { return written == layers(); })) break;
    ++grants_used_;
  }
  if (grants_used_ == before) return;
  rpc::PrefillEvent event;
  event.mutable_grant_used()->set_grants(static_cast<uint32_t>(grants_used_));
  stream_->Write(std::move(event));
}

void Prefill::OnToken(const engine::TokenEvent& event) {
  if (ended_) return;
  context_->speed.OnPrefill(num_tokens_ - event.cached_tokens, begun_, context_->control.Now());
  token_sent_ = true;
  token_at_ = context_->control.Now();
  Span prefill = span_.Child("prefill", SpanKind::kInternal, begun_);
  prefill.Set("millrace.prompt_tokens", int64_t{num_tokens_});
  prefill.Set("millrace.cached_tokens", int64_t{event.cached_tokens});
  prefill.End(token_at_, OkStatus());
  rpc::PrefillEvent message;
  TokenToProto(event, message.mutable_first_token());
  stream_->Write(std::move(message));
  SealWhenComplete();
}

// The seal states what was acknowledged, all of it: nothing reads the source pages any more.
void Prefill::SealWhenComplete() {
  const auto pages = static_cast<uint32_t>(num_pages_ - first_page_);
  const uint32_t pieces = static_cast<uint32_t>(layers()) * pages;
  if (!token_sent_ || pieces_written_ != pieces || digests_pending_ > 0) return;
  rpc::PrefillEvent message;
  rpc::PrefillEvent::Seal* seal = message.mutable_seal();
  seal->set_bytes(uint64_t{pieces} * context_->layout.piece_bytes());
  seal->set_pieces(pieces);
  seal->set_layers(static_cast<uint32_t>(layers()));
  seal->set_pages(pages);
  seal->set_digest(digest_);
  const Duration post = std::max(submitted_at_, token_at_) - token_at_;
  seal->set_post_us(std::chrono::duration_cast<std::chrono::microseconds>(post).count());
  const Duration wire = context_->control.Now() - first_submitted_at_;
  seal->set_wire_us(std::chrono::duration_cast<std::chrono::microseconds>(wire).count());
  stream_->Write(std::move(message));
  ticket_.MoveTo(TicketState::kSealed);
  End(OkStatus());
}

// Success comes here sealed; everything else aborts the ticket: stop computing, fence the writes, then let
// go.
void Prefill::End(const Status& status) {
  if (ended_) return;
  ended_ = true;
  waiting_.clear();
  const TimePoint now = context_->control.Now();
  if (first_submitted_at_ != TimePoint{}) {
    Span transfer = span_.Child("kv_transfer", SpanKind::kInternal, first_submitted_at_);
    transfer.Set("millrace.bytes", static_cast<int64_t>(pieces_written_ * context_->layout.piece_bytes()));
    transfer.Set("millrace.pieces", int64_t{pieces_written_});
    transfer.End(now, status);
  }
  span_.End(now, status);
  std::erase(context_->calls, this);
  context_->metrics.OnRequest("prefill", status);
  if (ticket_.state() == TicketState::kSealed) {
    ticket_.MoveTo(TicketState::kCommitted);
    context_->engine->ReleaseTicket(id_);
    ticket_.MoveTo(TicketState::kReleased);
  } else {
    ticket_.MoveTo(TicketState::kAborting);
    if (computing_) context_->engine->Cancel(id_);
    if (ticket_id_ == 0) {
      fenced_ = true;
      ReleaseWhenDrained();
    } else {
      context_->transfer->Cancel(peer_, ticket_id_, [self = shared_from_this()] {
        self->context_->control.Post([self] {
          self->fenced_ = true;
          self->ReleaseWhenDrained();
        });
      });
    }
  }
  std::exchange(stream_, nullptr)->Finish(status);
}

void Prefill::ReleaseWhenDrained() {
  if (!fenced_ || digests_pending_ > 0 || ticket_.released()) return;
  ticket_.MoveTo(TicketState::kDrained);
  if (computing_) context_->engine->ReleaseTicket(id_);
  ticket_.MoveTo(TicketState::kReleased);
}

}  // namespace

std::shared_ptr<PrefillCall> PrefillCall::Begin(WorkerContext* context,
                                                std::shared_ptr<CallStream<rpc::PrefillEvent>> stream) {
  const auto call = std::make_shared<Prefill>(context, std::move(stream));
  context->calls.push_back(call.get());
  return call;
}

}  // namespace millrace::server
