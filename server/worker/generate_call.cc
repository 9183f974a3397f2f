#include "server/worker/generate_call.h"

#include <algorithm>
#include <optional>
#include <utility>

#include "base/log.h"
#include "server/rpc/convert.h"
#include "server/worker/import_attempt.h"

namespace millrace::server {
namespace {

int64_t Microseconds(Duration d) { return std::chrono::duration_cast<std::chrono::microseconds>(d).count(); }

// Control thread. Shared by its stream (until it has ended), the engine's sinks and the tasks that are on
// their way.
class GenerateCall final : public WorkerCall,
                           public ImportOwner,
                           public std::enable_shared_from_this<GenerateCall> {
 public:
  GenerateCall(WorkerContext* context, const rpc::GenerateRequest& request,
               std::shared_ptr<CallStream<rpc::GenerateEvent>> stream)
      : context_(context), active_(context->active), request_(request), stream_(std::move(stream)) {}

  void Begin();
  void Abort(const Status& status) override { End(status); }
  void OnFirstToken(const engine::TokenEvent& first) override;
  void OnImported(const AttemptTimes& times) override;
  void OnAttemptFailed(const Status& status) override;

 private:
  class Sink;

  Status Admit();
  Status GenerateHere();
  Status ImportFrom(const std::string& address);
  std::optional<std::string> NextPrefillWorker();
  void JudgePrefillWorker(const Status& outcome);
  void OnEngineToken(uint64_t run, const engine::TokenEvent& event);
  void OnEngineError(uint64_t run, const Status& status);
  void Deliver(const engine::TokenEvent& event);
  // All but the first two are those of a transfer, and zero without one.
  struct PhaseDurations {
    Duration queue{}, prefill{}, transfer{}, post{}, commit{};
  };
  void SendPhases(const PhaseDurations& took, const std::string& prefill_worker);
  void TraceImport(const AttemptTimes& times);
  void End(const Status& status);
  std::unique_ptr<Sink> NewRun();

  WorkerContext* const context_;
  const ActiveGuard active_;
  const rpc::GenerateRequest request_;
  // Shared: the carrier needs it until it has ended. At most max_tokens tokens and one Phases go there. Null
  // at the end.
  std::shared_ptr<CallStream<rpc::GenerateEvent>> stream_;

  engine::EngineRequest native_;  // with the id of the current run
  TimePoint begun_;
  std::optional<TaskRunner::TimerId> deadline_timer_;
  // One run = one request to the engine. A retry with another P is a new run under a new id: grants always
  // give the next pages of a sequence, and those of the failed run stay with its ticket until it has drained.
  uint64_t run_ = 0;
  std::shared_ptr<ImportAttempt>
      attempt_;                 // null when the engine needs nobody else; shared with its callbacks
  int32_t prefill_next_ = 0;    // index in the request's list
  int32_t prefill_tried_ = 0;   // attempts
  std::string prefill_worker_;  // of the attempt; empty when there is none, or it has been judged
  bool prefill_here_ = false;
  Span span_;
  Span attempt_span_;  // with prefill_worker_
  TimePoint attempt_at_{};
  TimePoint decode_from_{};  // when the prompt's KV was complete here

  int32_t next_index_ = 0;    // number of the next token to send
  TimePoint token_at_{};      // when the engine made the last one; for the gap to the next
  int32_t first_token_ = -1;  // token id that was sent as the first
  bool phases_sent_ = false;
  bool ended_ = false;
};

// Engine thread: only posts.
class GenerateCall::Sink final : public engine::TokenSink {
 public:
  Sink(std::shared_ptr<GenerateCall> call, uint64_t run) : call_(std::move(call)), run_(run) {}
  void OnToken(const engine::TokenEvent& event) override {
    call_->context_->control.Post([call = call_, run = run_, event] { call->OnEngineToken(run, event); });
  }
  void OnError(const Status& status) override {
    call_->context_->control.Post([call = call_, run = run_, status] { call->OnEngineError(run, status); });
  }

 private:
  const std::shared_ptr<GenerateCall> call_;  // shared: the call may end first
  const uint64_t run_;
};

void GenerateCall::Begin() {
  context_->calls.push_back(this);
  begun_ = context_->control.Now();
  span_ = BeginSpan(context_->options.spans, TraceFromProto(request_), "millrace.worker.v1.Worker/Generate",
                    SpanKind::kServer, begun_);
  if (const Status status = Admit(); !status.ok()) return End(status);
  const std::optional<std::string> prefill = NextPrefillWorker();
  const Status status = prefill.has_value() ? ImportFrom(*prefill) : GenerateHere();
  if (!status.ok()) End(status);
}

Status GenerateCall::Admit() {
  const WorkerOptions& options = context_->options;
  if (context_->draining) return Unavailable("the worker is shutting down");
  if (context_->stalled) return Unavailable("the worker computes no further");
  if (request_.protocol_version() != kProtocolVersion) {
    return FailedPrecondition("the caller speaks protocol {}, the worker {}", request_.protocol_version(),
                              kProtocolVersion);
  }
  if (context_->role == WorkerRole::kPrefill) return FailedPrecondition("a prefill worker does not generate");
  if (request_.model_digest() != options.model_digest) {
    return FailedPrecondition("the request is for model {}, the worker has {}", request_.model_digest(),
                              options.model_digest);
  }
  MR_ASSIGN_OR_RETURN(native_, RequestFromProto(request_, 0, begun_));
  MR_RETURN_IF_ERROR(context_->Constrain(&native_.sampling));
  next_index_ = request_.output_size();
  if (native_.deadline != kNoDeadline) {
    deadline_timer_ = context_->control.PostAt(native_.deadline, [weak = weak_from_this()] {
      if (const auto self = weak.lock(); self != nullptr)
        self->End(DeadlineExceeded("the request's time is up"));
    });
  }
  return OkStatus();
}

// Those that failed this worker lately are passed over; when nobody is left, it prefills itself.
std::optional<std::string> GenerateCall::NextPrefillWorker() {
  while (prefill_next_ < request_.prefill_size() && prefill_tried_ < context_->options.prefill_attempts_max) {
    const std::string& address = request_.prefill(prefill_next_++);
    if (!context_->prefill_health.Allows(address)) continue;
    ++prefill_tried_;
    return address;
  }
  return std::nullopt;
}

void GenerateCall::JudgePrefillWorker(const Status& outcome) {
  if (prefill_worker_.empty()) return;
  const std::string address = std::exchange(prefill_worker_, {});
  attempt_span_.End(context_->control.Now(), outcome);
  WorkerHealth& health = context_->prefill_health;
  if (outcome.ok()) {
    health.Succeeded(address);
  } else if (outcome.code() == absl::StatusCode::kResourceExhausted ||
             outcome.code() == absl::StatusCode::kCancelled ||
             outcome.code() == absl::StatusCode::kDeadlineExceeded) {
    health.Neither(address);  // full, or nobody waits any more
  } else {
    health.Failed(address);
    context_->metrics.OnKvFailed(address);
  }
}

std::unique_ptr<GenerateCall::Sink> GenerateCall::NewRun() {
  native_.id = context_->NextId();
  return std::make_unique<Sink>(shared_from_this(), ++run_);
}

Status GenerateCall::GenerateHere() {
  prefill_here_ = true;
  std::unique_ptr<Sink> sink = NewRun();
  return context_->engine->Generate(native_, std::move(sink));
}

Status GenerateCall::ImportFrom(const std::string& address) {
  std::unique_ptr<Sink> sink = NewRun();
  MR_RETURN_IF_ERROR(context_->engine->BeginImport(native_, std::move(sink)));
  prefill_worker_ = address;
  context_->prefill_health.Begin(address);
  attempt_at_ = context_->control.Now();
  attempt_span_ = span_.Child("millrace.worker.v1.Worker/Prefill", SpanKind::kClient, attempt_at_);
  attempt_span_.Set("server.address", address);
  ImportParams params{address, native_.id, request_, native_.deadline};
  TraceToProto(attempt_span_.context(), &params.request);
  attempt_ = ImportAttempt::Start(context_, this, std::move(params));
  return OkStatus();
}

void GenerateCall::OnFirstToken(const engine::TokenEvent& first) { Deliver(first); }

void GenerateCall::OnImported(const AttemptTimes& times) {
  const std::string address = prefill_worker_;
  TraceImport(times);
  context_->metrics.OnKvReceived(address, times.wire, times.post, times.bytes, times.pieces);
  JudgePrefillWorker(OkStatus());
  attempt_.reset();
  SendPhases({.queue = times.granted - begun_,
              .prefill = times.first_token - std::min(times.granted, times.first_token),
              .transfer = times.committed - times.first_token,
              .post = times.post,
              .commit = times.committed - times.sealed},
             address);
}

void GenerateCall::OnAttemptFailed(const Status& status) {
  JudgePrefillWorker(status);
  attempt_.reset();
  if (ended_) return;
  const std::optional<std::string> next = NextPrefillWorker();
  if (!next.has_value()) {
    LogInfo("request {}: prefills here: {}", request_.request_id(), Message(status));
    prefill_here_ = true;
    context_->engine->ImportToGenerate(native_.id);
    return;
  }
  context_->engine->Cancel(native_.id);
  if (const Status begun = ImportFrom(*next); !begun.ok()) End(begun);
}

void GenerateCall::OnEngineToken(uint64_t run, const engine::TokenEvent& event) {
  if (ended_ || run != run_) return;
  const TimePoint now = context_->control.Now();
  if (token_at_ != TimePoint{}) context_->speed.OnTokenGap(now - token_at_);
  token_at_ = now;
  if (prefill_here_ && !phases_sent_) {
    SendPhases({.prefill = now - begun_}, "");
    span_.Child("prefill", SpanKind::kInternal, begun_).End(now, OkStatus());
    decode_from_ = now;
  }
  Deliver(event);
}

void GenerateCall::OnEngineError(uint64_t run, const Status& status) {
  if (run == run_) End(status);
}

// Every token once, in order. The first one can come again, from another P or from here, and is then the
// same: sampling is a pure function of request and position.
void GenerateCall::Deliver(const engine::TokenEvent& event) {
  if (ended_) return;
  const int32_t first_index = request_.output_size();
  if (event.index == first_index && next_index_ > first_index) {
    if (event.token.token == first_token_) return;
    LogError("request {}: two workers sampled different first tokens", request_.request_id());
    return End(
        DataLoss("two workers sampled different first tokens ({} and {})", first_token_, event.token.token));
  }
  if (event.index != next_index_)
    return End(Internal("token {} came instead of {}", event.index, next_index_));
  if (event.index == first_index) first_token_ = event.token.token;
  ++next_index_;
  rpc::GenerateEvent message;
  TokenToProto(event, message.mutable_token());
  stream_->Write(std::move(message));
  if (event.finish != engine::FinishReason::kNone) End(OkStatus());
}

void GenerateCall::SendPhases(const PhaseDurations& took, const std::string& prefill_worker) {
  phases_sent_ = true;
  rpc::GenerateEvent message;
  rpc::Phases* phases = message.mutable_phases();
  phases->set_queue_us(Microseconds(took.queue));
  phases->set_prefill_us(Microseconds(took.prefill));
  phases->set_transfer_us(Microseconds(took.transfer));
  phases->set_post_us(Microseconds(took.post));
  phases->set_commit_us(Microseconds(took.commit));
  phases->set_prefill_worker(prefill_worker);
  stream_->Write(std::move(message));
  context_->metrics.OnPhase("queue", took.queue);
  context_->metrics.OnPhase("prefill", took.prefill);
  if (!prefill_worker.empty()) context_->metrics.OnPhase("transfer", took.transfer);
}

// What D itself did and waited for; P tells the rest.
void GenerateCall::TraceImport(const AttemptTimes& times) {
  decode_from_ = times.committed;
  if (!attempt_span_.recording()) return;
  attempt_span_.Child("grant_wait", SpanKind::kInternal, attempt_at_).End(times.granted, OkStatus());
  attempt_span_.Child("commit", SpanKind::kInternal, times.sealed).End(times.committed, OkStatus());
}

// Whatever ran for this request stops.
void GenerateCall::End(const Status& status) {
  if (ended_) return;
  ended_ = true;
  if (deadline_timer_.has_value()) context_->control.CancelTimer(*deadline_timer_);
  if (run_ > 0) context_->engine->Cancel(native_.id);  // nothing when it ended by itself
  if (const auto attempt = std::move(attempt_); attempt != nullptr) attempt->Abandon();
  JudgePrefillWorker(Cancelled("abandoned"));
  const TimePoint now = context_->control.Now();
  if (decode_from_ != TimePoint{}) span_.Child("decode", SpanKind::kInternal, decode_from_).End(now, status);
  span_.End(now, status);
  std::erase(context_->calls, this);
  context_->metrics.OnRequest("generate", status);
  std::exchange(stream_, nullptr)->Finish(status);
}

}  // namespace

std::shared_ptr<WorkerCall> BeginGenerate(WorkerContext* context, const rpc::GenerateRequest& request,
                                          std::shared_ptr<CallStream<rpc::GenerateEvent>> stream) {
  const auto call = std::make_shared<GenerateCall>(context, request, std::move(stream));
  call->Begin();
  return call;
}

}  // namespace millrace::server
