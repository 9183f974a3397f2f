#include "server/gateway/generation.h"

#include "base/log.h"
#include "server/rpc/channel.h"
#include "server/rpc/convert.h"

namespace millrace::server {

namespace {

// How often a running answer looks whether its worker lives, and how long that worker must not have sent a
// token before the silence of its heartbeat counts.
constexpr Duration kLookEvery = std::chrono::milliseconds(250);
constexpr Duration kSilenceMin = std::chrono::seconds(1);
constexpr Duration kAskAgainEvery = std::chrono::milliseconds(100);

// Another worker may do what this one could not. kCancelled: not by this gateway, so by a worker that ends.
// kInternal: its engine failed, or the connection broke in a way that gRPC has no better word for.
bool AnotherMay(const Status& status) {
  switch (status.code()) {
    case absl::StatusCode::kUnavailable:
    case absl::StatusCode::kAborted:
    case absl::StatusCode::kCancelled:
    case absl::StatusCode::kUnknown:
    case absl::StatusCode::kInternal:
    case absl::StatusCode::kResourceExhausted:
    case absl::StatusCode::kFailedPrecondition:
      return true;
    default:
      return false;
  }
}

}  // namespace

// Carries gRPC's callbacks of one attempt to the generation's runner.
class Generation::Observer : public GenerateObserver {
 public:
  // Shared with the generation because a call's last callback may come after the client has gone.
  Observer(std::shared_ptr<Generation> generation, int32_t attempt)
      : generation_(std::move(generation)), attempt_(attempt) {}
  void OnEvent(const rpc::GenerateEvent& event) override {
    generation_->runner_->Post(
        [generation = generation_, attempt = attempt_, event] { generation->OnEvent(attempt, event); });
  }
  void OnDone(const grpc::Status& status) override {
    generation_->runner_->Post(
        [generation = generation_, attempt = attempt_, status] { generation->OnDone(attempt, status); });
  }

 private:
  const std::shared_ptr<Generation> generation_;
  const int32_t attempt_;
};

Generation::Generation(std::shared_ptr<TaskRunner> runner, Membership& membership, InFlight& in_flight,
                       const GenerationOptions& options, const GenerationRequest& request,
                       std::function<void(const Event&)> on_event)
    : presence_(in_flight),
      runner_(std::move(runner)),
      membership_(membership),
      in_flight_(in_flight),
      options_(options),
      deadline_(request.deadline),
      spans_(request.spans),
      trace_(request.trace),
      on_event_(std::move(on_event)) {
  request_.set_protocol_version(kProtocolVersion);
  request_.set_request_id(request.id);
  request_.mutable_prompt()->Assign(request.prompt.begin(), request.prompt.end());
  request_.set_priority(request.priority);
  request_.set_cache_salt(request.cache_salt);
  SamplingToProto(request.sampling, request_.mutable_sampling());
}

std::shared_ptr<Generation> Generation::Create(std::shared_ptr<TaskRunner> runner, Membership& membership,
                                               InFlight& in_flight, const GenerationOptions& options,
                                               const GenerationRequest& request,
                                               std::function<void(const Event&)> on_event) {
  // Shared: its answer and the callbacks of a running call both hold it.
  return std::shared_ptr<Generation>(
      new Generation(std::move(runner), membership, in_flight, options, request, std::move(on_event)));
}

void Generation::Dispatch() {
  const auto left = deadline_ == kNoDeadline ? Duration::max() : deadline_ - runner_->Now();
  if (left <= Duration::zero()) return Finish(DeadlineExceeded("the request's time was used up"));
  RouteRequest wanted;
  wanted.prompt_tokens = request_.prompt_size() + request_.output_size();
  wanted.local_prefill_tokens_max =
      request_.sampling().prompt_logprobs() ? INT32_MAX : options_.local_prefill_tokens_max;
  wanted.exclude = failed_;
  wanted.model_digest = request_.model_digest();
  decode_lease_.Release();
  prefill_lease_.Release();
  std::vector<int32_t> tokens(request_.prompt().begin(), request_.prompt().end());
  tokens.insert(tokens.end(), request_.output().begin(), request_.output().end());
  std::vector<WorkerSnapshot> workers = membership_.Snapshot({tokens, request_.cache_salt()});
  in_flight_.Apply(&workers);
  const auto route = PickRoute(workers, wanted);
  if (!route.ok()) return NobodyServes(route.status());
  waiting_since_ = {};
  for (const WorkerSnapshot& worker : workers) {
    if (worker.address != route->decode) continue;
    decode_ = worker.address;
    decode_epoch_ = worker.epoch;
    // The first worker settles the model: an answer is never continued by another one's weights.
    request_.set_model_digest(worker.model_digest);
  }
  request_.mutable_prefill()->Assign(route->prefill.begin(), route->prefill.end());
  if (deadline_ != kNoDeadline)
    request_.set_timeout_us(std::chrono::duration_cast<std::chrono::microseconds>(left).count());
  decode_lease_ = in_flight_.Take(route->decode, /*judged=*/true);
  if (!route->prefill.empty()) prefill_lease_ = in_flight_.Take(route->prefill.front(), /*judged=*/false);
  ++attempt_;
  ++fruitless_;
  failed_.push_back(decode_);  // if this attempt ends without a finish, another worker goes on
  heard_ = runner_->Now();
  span_ = BeginSpan(spans_, trace_, "millrace.worker.v1.Worker/Generate", SpanKind::kClient, heard_);
  span_.Set("server.address", decode_);
  span_.Set("millrace.tokens_before", int64_t{request_.output_size()});
  TraceToProto(span_.context(), &request_);
  call_ = membership_.Generate(route->decode, request_, deadline_,
                               std::make_shared<Observer>(shared_from_this(), attempt_));
  Watch();
}

// A new request is told so. An answer that has begun waits a while: workers come back, also those that failed
// it.
void Generation::NobodyServes(const Status& why) {
  if (cause_.ok()) return Finish(why);
  const TimePoint now = runner_->Now();
  if (waiting_since_ == TimePoint{}) waiting_since_ = now;
  const bool full = cause_.code() == absl::StatusCode::kResourceExhausted && request_.output().empty();
  // The first cause says more than "no worker".
  if (full || now - waiting_since_ >= options_.failover_patience) return Finish(cause_);
  failed_.clear();
  Retry(kAskAgainEvery);
}

void Generation::SetTimer(Duration wait, void (Generation::*then)()) {
  if (timer_.has_value()) runner_->CancelTimer(*timer_);
  timer_ = runner_->PostAt(runner_->Now() + wait, [self = shared_from_this(), then] {
    self->timer_.reset();
    (self.get()->*then)();
  });
}

void Generation::Watch() { SetTimer(kLookEvery, &Generation::LookAfterWorker); }

// The stream of a worker that is frozen or stuck just stays silent: its heartbeat tells it from a slow one.
void Generation::LookAfterWorker() {
  const Duration silent = runner_->Now() - heard_;
  if (silent < kSilenceMin || membership_.Alive(decode_, decode_epoch_)) return Watch();
  call_->Cancel();
  Lost(Unavailable("worker {} shows no sign of life", decode_));
}

// The attempt is over, the answer is not.
void Generation::Lost(const Status& cause) {
  ++attempt_;  // whatever it still says is stale
  span_.End(runner_->Now(), cause);
  if (AnotherMay(cause) && cause.code() != absl::StatusCode::kResourceExhausted) decode_lease_.Failed();
  decode_lease_.Release();
  prefill_lease_.Release();
  if (!CanContinue(cause)) return Finish(cause);
  LogWarning("request {}: worker {} failed after {} tokens ({}); trying another", request_.request_id(),
             decode_, request_.output_size(), Message(cause));
  cause_ = cause;
  Retry(in_flight_.NextRetry());
}

void Generation::Retry(Duration wait) {
  if (wait == Duration(0)) return Dispatch();
  SetTimer(wait, &Generation::Dispatch);
}

void Generation::OnEvent(int32_t attempt, const rpc::GenerateEvent& event) {
  if (attempt != attempt_ || ended_) return;
  if (event.has_phases()) {
    const rpc::Phases& phases = event.phases();
    return on_event_(PhaseTimes{.known = true,
                                .queue_us = phases.queue_us(),
                                .prefill_us = phases.prefill_us(),
                                .transfer_us = phases.transfer_us(),
                                .post_us = phases.post_us(),
                                .commit_us = phases.commit_us(),
                                .prefill_worker = phases.prefill_worker()});
  }
  if (!event.has_token()) return;
  engine::TokenEvent token = TokenFromProto(event.token());
  if (token.index != request_.output_size()) {
    call_->Cancel();
    return Finish(
        Internal("worker {} sent token {} when {} was due", decode_, token.index, request_.output_size()));
  }
  heard_ = runner_->Now();
  fruitless_ = 0;
  failed_ = {decode_};
  cause_ = OkStatus();
  decode_lease_.Succeeded();
  request_.mutable_sampling()->set_prompt_logprobs(false);  // they came with this token, if ever
  prefill_lease_.Release();
  request_.add_output(token.token.token);
  const bool last = token.finish != engine::FinishReason::kNone;
  if (last) span_.End(heard_, OkStatus());
  on_event_(token);
  // The answer is whole: what becomes of its worker and its stream now is nothing to it.
  if (last) Finish(OkStatus());
}

bool Generation::CanContinue(const Status& status) const {
  return fruitless_ < options_.attempts_max && AnotherMay(status);
}

void Generation::OnDone(int32_t attempt, const grpc::Status& status) {
  if (attempt != attempt_ || ended_) return;
  if (status.ok()) return Finish(Internal("worker {} ended the answer without a finish reason", decode_));
  Lost(FromGrpc(status));
}

void Generation::Finish(Status status) {
  if (ended_) return;
  ended_ = true;
  span_.End(runner_->Now(), status);
  if (timer_.has_value()) runner_->CancelTimer(*timer_);
  decode_lease_.Release();
  prefill_lease_.Release();
  on_event_(End{std::move(status)});
}

void Generation::Cancel(const Status& reason) {
  if (ended_) return;
  if (call_ != nullptr) call_->Cancel();
  Finish(reason);
}

}  // namespace millrace::server
