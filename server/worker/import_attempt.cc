#include "server/worker/import_attempt.h"

#include <algorithm>

#include "base/log.h"
#include "server/rpc/convert.h"
#include "server/worker/pieces.h"

namespace millrace::server {
namespace {

constexpr size_t kGrantsInFlight = 2;
constexpr int64_t kPostUsMax =
    3600'000'000;  // what P says of itself is bounded before it is added to anything
// How long without any progress until the next P gets its chance. Only the attempt ends then; memory waits
// for proof.
constexpr Duration kAcceptPatience = std::chrono::seconds(2);
constexpr Duration kPrefillPatience = std::chrono::seconds(60);
// Imports that hold some pages and wait for more could wait for each other.
constexpr Duration kGrantPatience = std::chrono::seconds(10);

int32_t SequencePages(const rpc::GenerateRequest& request) {
  return engine::PagesFor(int64_t{request.prompt_size()} + request.output_size());
}

}  // namespace

std::shared_ptr<ImportAttempt> ImportAttempt::Start(WorkerContext* context, ImportOwner* owner,
                                                    ImportParams params) {
  auto attempt = std::make_shared<ImportAttempt>(context, owner, std::move(params));
  attempt->RequestGrants();
  attempt->Progress();
  attempt->Watchdog();
  return attempt;
}

ImportAttempt::ImportAttempt(WorkerContext* context, ImportOwner* owner, ImportParams params)
    : context_(context),
      active_(context->active),
      owner_(owner),
      params_(std::move(params)),
      num_pages_(SequencePages(params_.request)),
      first_index_(params_.request.output_size()),
      ticket_(&context->metrics.imports()) {}

// Only once the first pages are here: the engine keeps the rest for an import that it admitted, so what P
// computes can always be sent. P working for a request that waits here, while one that is admitted here waits
// there, could hold up both for ever.
void ImportAttempt::OpenStream() {
  rpc::PrefillCommand command;
  rpc::PrefillCommand::Start* start = command.mutable_start();
  *start->mutable_request() = params_.request;
  start->mutable_request()->clear_prefill();
  start->mutable_request()->set_timeout_us(TimeoutUs(params_.deadline, context_->control.Now()));
  start->set_transfer_descriptor(context_->descriptor);
  start->set_region(context_->region);
  start->set_num_pages(static_cast<uint32_t>(context_->layout.num_pages));
  start->set_layout_hash(context_->layout_hash);
  start->set_protocol_version(kProtocolVersion);
  start->set_epoch(context_->transfer->epoch());
  start->set_first_page(static_cast<uint32_t>(first_page_));
  stream_ = context_->prefill_workers.Open(context_, params_.address, params_.deadline, std::move(command),
                                           shared_from_this());
}

// The first grant comes alone: it says how much is cached here and need not come.
void ImportAttempt::RequestGrants() {
  const size_t in_flight_max = first_page_ < 0 ? 1 : kGrantsInFlight;
  while (pages_requested_ < num_pages_ && grants_requested_ < grants_used_ + in_flight_max) {
    const int32_t count = std::min(context_->options.grant_pages, num_pages_ - pages_requested_);
    pages_requested_ += count;
    ++grants_requested_;
    context_->engine->Grant(params_.id, count, [self = shared_from_this()](auto pages) {
      self->context_->control.Post(
          [self, pages = std::move(pages)]() mutable { self->OnGrant(std::move(pages)); });
    });
  }
}

void ImportAttempt::OnGrant(StatusOr<engine::GrantedPages> granted) {
  if (over()) return;  // the ticket's hold on such pages goes with the others
  if (!granted.ok()) return Fail(Annotate(granted.status(), "pages for the prompt"));
  const std::vector<engine::PageId>& pages = granted->pages;
  grants_.push_back({pages_.size(), pages.size()});
  pages_.insert(pages_.end(), pages.begin(), pages.end());
  Progress();
  if (first_page_ < 0) {
    first_page_ = granted->first_page;
    pages_requested_ = first_page_ + static_cast<int32_t>(pages.size());
    times_.granted = context_->control.Now();
    OpenStream();
    RequestGrants();
  }
  SendGrants();
}

void ImportAttempt::SendGrants() {
  while (accepted_ && grants_sent_ < grants_.size()) {
    if (const Status status = SendGrant(grants_[grants_sent_]); !status.ok()) return Fail(status);
    ++grants_sent_;
  }
}

Status ImportAttempt::SendGrant(const Grant& grant) {
  const std::span<const engine::PageId> pages = std::span(pages_).subspan(grant.first, grant.count);
  std::vector<transfer::Range> ranges = GrantRanges(context_->layout, context_->region, pages);
  if (ticket_id_ == 0) {
    MR_ASSIGN_OR_RETURN(ticket_id_, context_->transfer->OpenTicket(peer_epoch_, std::move(ranges)));
    ticket_.MoveTo(TicketState::kGranted);
  } else {
    MR_RETURN_IF_ERROR(context_->transfer->ExtendTicket(ticket_id_, std::move(ranges)));
  }
  rpc::PrefillCommand command;
  command.mutable_grant()->set_ticket(ticket_id_);
  PagesToProto(pages, command.mutable_grant());
  stream_->Write(std::move(command));
  if (ticket_.state() == TicketState::kGranted) ticket_.MoveTo(TicketState::kStreaming);
  return OkStatus();
}

void ImportAttempt::OnEvent(const rpc::PrefillEvent& event) {
  if (over() || ticket_.state() == TicketState::kSealed) return;
  Progress();
  if (const Status status = HandleEvent(event); !status.ok()) Fail(status);
}

Status ImportAttempt::HandleEvent(const rpc::PrefillEvent& event) {
  switch (event.kind_case()) {
    case rpc::PrefillEvent::kAccepted:
      if (accepted_) return InvalidArgument("accepted twice");
      accepted_ = true;
      peer_epoch_ = event.accepted().epoch();
      SendGrants();
      return OkStatus();
    case rpc::PrefillEvent::kGrantUsed:
      if (event.grant_used().grants() > grants_sent_)
        return InvalidArgument("uses grants that it does not have");
      grants_used_ = std::max<size_t>(grants_used_, event.grant_used().grants());
      RequestGrants();
      return OkStatus();
    case rpc::PrefillEvent::kFirstToken: {
      MR_RETURN_IF_ERROR(CheckFirstToken(event.first_token()));
      engine::TokenEvent first = TokenFromProto(event.first_token());
      first.cached_tokens = std::max(first.cached_tokens, first_page_ * engine::kPageTokens);
      has_first_token_ = true;
      first_token_ = first.token;
      mtp_hidden_ = std::exchange(first.mtp_hidden, {});  // not for the caller
      times_.first_token = context_->control.Now();
      owner_->OnFirstToken(first);  // may abandon this attempt
      return OkStatus();
    }
    case rpc::PrefillEvent::kSeal:
      MR_RETURN_IF_ERROR(CheckSeal(event.seal()));
      ticket_.MoveTo(TicketState::kSealed);
      sealed_digest_ = event.seal().digest();
      times_.sealed = context_->control.Now();
      times_.post = std::min<Duration>(
          times_.sealed - times_.first_token,
          std::chrono::microseconds(std::clamp<int64_t>(event.seal().post_us(), 0, kPostUsMax)));
      times_.wire = std::chrono::microseconds(std::clamp<int64_t>(event.seal().wire_us(), 0, kPostUsMax));
      times_.bytes = event.seal().bytes();
      times_.pieces = event.seal().pieces();
      // Close first, digest then: what is digested is what nobody can write to any more.
      CloseTicket();
      return OkStatus();
    case rpc::PrefillEvent::KIND_NOT_SET:
      break;
  }
  return InvalidArgument("an event of an unknown kind");
}

Status ImportAttempt::CheckFirstToken(const rpc::Token& token) const {
  if (has_first_token_) return InvalidArgument("sent two first tokens");
  if (token.index() != first_index_) {
    return InvalidArgument("numbered the first token {} instead of {}", token.index(), first_index_);
  }
  if (token.token() < 0 || token.token() >= context_->engine->config().vocab_size) {
    return InvalidArgument("sampled {}, which is no token", token.token());
  }
  return OkStatus();
}

Status ImportAttempt::CheckSeal(const rpc::PrefillEvent::Seal& seal) const {
  const auto layers = static_cast<uint64_t>(context_->layout.num_layers);
  const auto pages = static_cast<uint64_t>(num_pages_ - first_page_);
  if (!has_first_token_) return DataLoss("sealed before the first token");
  if (pages_.size() != pages || grants_sent_ != grants_.size() ||
      ticket_.state() != TicketState::kStreaming) {
    return DataLoss("sealed with {} of {} pages granted", pages_.size(), pages);
  }
  if (seal.layers() != layers || seal.pages() != pages || seal.pieces() != layers * pages ||
      seal.bytes() != layers * pages * context_->layout.piece_bytes()) {
    return DataLoss("sealed {} layers, {} pages, {} pieces, {} bytes instead of {} layers, {} pages",
                    seal.layers(), seal.pages(), seal.pieces(), seal.bytes(), layers, pages);
  }
  return OkStatus();
}

void ImportAttempt::OnStreamEnd(const Status& status) {
  stream_.reset();
  if (over() || ticket_.state() == TicketState::kSealed) return;
  Fail(status.ok() ? DataLoss("ended without a seal") : status);
}

void ImportAttempt::CloseTicket() {
  closing_ = true;
  if (ticket_id_ == 0) return OnClosed();
  context_->transfer->CloseTicket(ticket_id_, [self = shared_from_this()] {
    self->context_->control.Post([self] { self->OnClosed(); });
  });
}

void ImportAttempt::OnClosed() {
  closed_ = true;
  if (ticket_.aborted()) return ReleaseWhenDrained();
  digesting_ = true;
  context_->digest.Post([self = shared_from_this()] {
    const uint64_t digest =
        SequenceDigest(self->context_->layout, self->context_->kv, self->pages_, self->first_page_);
    self->context_->control.Post([self, digest] { self->OnDigest(digest); });
  });
}

void ImportAttempt::OnDigest(uint64_t digest) {
  digesting_ = false;
  if (ticket_.aborted()) return ReleaseWhenDrained();
  if (digest != sealed_digest_) {
    return Fail(DataLoss("{} pages arrived other than they were sent: digest {:016x} instead of {:016x}",
                         pages_.size(), digest, sealed_digest_));
  }
  Commit();
}

void ImportAttempt::Commit() {
  times_.committed = context_->control.Now();
  ticket_.MoveTo(TicketState::kCommitted);
  context_->metrics.OnPrefillAttempt("committed");  // before anybody can see what follows from it
  context_->engine->FinishImport(params_.id, first_token_, /*first_already_sent=*/true,
                                 std::move(mtp_hidden_));
  context_->engine->ReleaseTicket(params_.id);
  ticket_.MoveTo(TicketState::kReleased);
  if (ImportOwner* owner = std::exchange(owner_, nullptr); owner != nullptr) owner->OnImported(times_);
}

void ImportAttempt::Fail(const Status& status) {
  ImportOwner* const owner = std::exchange(owner_, nullptr);
  Abort();
  context_->metrics.OnPrefillAttempt("failed");
  LogWarning("request {}: prefill worker {} failed while {}: {}", params_.request.request_id(),
             params_.address, accepted_ ? "prefilling" : "being asked", Message(status));
  if (owner != nullptr) owner->OnAttemptFailed(status);
}

void ImportAttempt::Abandon() {
  owner_ = nullptr;
  if (over()) return;
  Abort();
  context_->metrics.OnPrefillAttempt("cancelled");
}

void ImportAttempt::Abort() {
  if (stream_ != nullptr) stream_->Cancel();
  ticket_.MoveTo(TicketState::kAborting);
  if (!closing_) {
    CloseTicket();
  } else if (closed_) {
    ReleaseWhenDrained();
  }
}

void ImportAttempt::ReleaseWhenDrained() {
  if (digesting_) return;
  ticket_.MoveTo(TicketState::kDrained);
  context_->engine->ReleaseTicket(params_.id);
  ticket_.MoveTo(TicketState::kReleased);
}

void ImportAttempt::Progress() { progress_at_ = context_->control.Now(); }

Duration ImportAttempt::PatienceNow() const {
  if (!accepted_) return kAcceptPatience;
  return grants_.size() < grants_requested_ ? kGrantPatience : kPrefillPatience;
}

// Looks at most every second, because what is waited for changes. Once sealed there is nobody to lose
// patience with.
void ImportAttempt::Watchdog() {
  if (over() || ticket_.state() == TicketState::kSealed) return;
  // P has not been asked while this engine has no room for the request, whose deadline bounds the wait.
  if (pages_.empty()) Progress();
  const TimePoint limit = progress_at_ + PatienceNow();
  if (context_->control.Now() >= limit) {
    const double silent = Seconds(context_->control.Now() - progress_at_);
    // Pages that this engine has not: nothing against P.
    if (accepted_ && grants_.size() < grants_requested_)
      return Fail(ResourceExhausted("no pages for the rest of the prompt for {:.1f} s", silent));
    return Fail(Unavailable("no progress for {:.1f} s", silent));
  }
  const TimePoint look = std::min<TimePoint>(limit, context_->control.Now() + std::chrono::seconds(1));
  context_->control.PostAt(look, [weak = weak_from_this()] {
    if (const auto self = weak.lock(); self != nullptr) self->Watchdog();
  });
}

}  // namespace millrace::server
