#include "server/gateway/generation.h"

#include <algorithm>
#include <boost/asio/post.hpp>

#include "base/log.h"
#include "server/rpc/convert.h"

namespace millrace::server {

namespace net = boost::asio;

namespace {

Status FromGrpc(const grpc::Status& status) {
  // gRPC's codes are absl's codes.
  return MakeStatus(static_cast<absl::StatusCode>(status.error_code()), status.error_message());
}

}  // namespace

// Carries gRPC's callbacks of one attempt to the generation's executor.
class Generation::Observer : public GenerateObserver {
 public:
  // Shared with the generation because a call's last callback may come after the client has gone.
  Observer(std::shared_ptr<Generation> generation, int32_t attempt)
      : generation_(std::move(generation)), attempt_(attempt) {}
  void OnEvent(const rpc::GenerateEvent& event) override {
    net::post(generation_->executor_,
              [generation = generation_, attempt = attempt_, event] { generation->OnEvent(attempt, event); });
  }
  void OnDone(const grpc::Status& status) override {
    net::post(generation_->executor_, [generation = generation_, attempt = attempt_, status] {
      generation->OnDone(attempt, status);
    });
  }

 private:
  const std::shared_ptr<Generation> generation_;
  const int32_t attempt_;
};

Generation::Generation(net::any_io_executor executor, Membership& membership, InFlight& in_flight,
                       const GenerationOptions& options, const GenerationRequest& request,
                       std::function<void(const Event&)> on_event)
    : presence_(in_flight),
      executor_(std::move(executor)),
      membership_(membership),
      in_flight_(in_flight),
      options_(options),
      deadline_(request.deadline),
      on_event_(std::move(on_event)) {
  request_.set_request_id(request.id);
  request_.mutable_prompt()->Assign(request.prompt.begin(), request.prompt.end());
  request_.set_priority(request.priority);
  request_.set_cache_salt(request.cache_salt);
  SamplingToProto(request.sampling, request_.mutable_sampling());
}

std::shared_ptr<Generation> Generation::Create(net::any_io_executor executor, Membership& membership,
                                               InFlight& in_flight, const GenerationOptions& options,
                                               const GenerationRequest& request,
                                               std::function<void(const Event&)> on_event) {
  // Shared: its answer and the callbacks of a running call both hold it.
  return std::shared_ptr<Generation>(
      new Generation(std::move(executor), membership, in_flight, options, request, std::move(on_event)));
}

// Finds a worker and starts there; when nobody can serve, ends with `cause` if there is one: it says more
// than "no worker".
void Generation::Dispatch(const Status& cause) {
  const auto left = deadline_ == kNoDeadline ? Duration::max() : deadline_ - Clock::System().Now();
  if (left <= Duration::zero()) return Finish(DeadlineExceeded("the request's time was used up"));
  RouteRequest wanted;
  wanted.prompt_tokens = request_.prompt_size() + request_.output_size();
  wanted.local_prefill_tokens_max =
      request_.sampling().prompt_logprobs() ? INT32_MAX : options_.local_prefill_tokens_max;
  wanted.exclude = failed_;
  decode_lease_.Release();
  prefill_lease_.Release();
  std::vector<int32_t> tokens(request_.prompt().begin(), request_.prompt().end());
  tokens.insert(tokens.end(), request_.output().begin(), request_.output().end());
  std::vector<WorkerSnapshot> workers = membership_.Snapshot({tokens, request_.cache_salt()});
  in_flight_.Apply(&workers);
  const auto route = PickRoute(workers, wanted);
  if (!route.ok()) return Finish(cause.ok() ? route.status() : cause);
  for (const WorkerSnapshot& worker : workers) {
    // The first worker settles the model: an answer is never continued by another one's weights.
    if (worker.address == route->decode && request_.model_digest().empty())
      request_.set_model_digest(worker.model_digest);
  }
  request_.mutable_prefill()->Assign(route->prefill.begin(), route->prefill.end());
  auto grpc_deadline = std::chrono::system_clock::time_point::max();
  if (deadline_ != kNoDeadline) {
    request_.set_timeout_us(std::chrono::duration_cast<std::chrono::microseconds>(left).count());
    grpc_deadline = std::chrono::system_clock::now() + left;
  }
  decode_lease_ = in_flight_.Take(route->decode);
  if (!route->prefill.empty()) prefill_lease_ = in_flight_.Take(route->prefill.front());
  ++attempt_;
  failed_.push_back(route->decode);  // if this attempt ends without a finish, this worker is not asked again
  call_ = StartGenerate(membership_.ChannelTo(route->decode), request_, grpc_deadline,
                        std::make_shared<Observer>(shared_from_this(), attempt_));
}

void Generation::OnEvent(int32_t attempt, const rpc::GenerateEvent& event) {
  if (attempt != attempt_ || ended_) return;
  if (event.has_phases()) {
    const rpc::Phases& phases = event.phases();
    return on_event_(
        PhaseTimes{phases.queue_us(), phases.prefill_us(), phases.transfer_us(), phases.prefill_worker()});
  }
  if (!event.has_token()) return;
  engine::TokenEvent token = TokenFromProto(event.token());
  if (token.index != request_.output_size() || finish_seen_) {
    call_->Cancel();
    return Finish(Internal("worker {} sent token {} when {} was due", failed_.back(), token.index,
                           request_.output_size()));
  }
  prefill_lease_.Release();
  request_.add_output(token.token.token);
  finish_seen_ = token.finish != engine::FinishReason::kNone;
  on_event_(token);
}

bool Generation::CanContinue(const grpc::Status& status) const {
  if (attempt_ >= options_.attempts_max) return false;
  switch (status.error_code()) {
    case grpc::StatusCode::UNAVAILABLE:
    case grpc::StatusCode::ABORTED:
    case grpc::StatusCode::RESOURCE_EXHAUSTED:
    case grpc::StatusCode::FAILED_PRECONDITION:
      return true;
    default:
      return false;
  }
}

void Generation::OnDone(int32_t attempt, const grpc::Status& status) {
  if (attempt != attempt_ || ended_) return;
  if (finish_seen_) return Finish(OkStatus());
  if (status.ok())
    return Finish(Internal("worker {} ended the answer without a finish reason", failed_.back()));
  if (!CanContinue(status)) return Finish(FromGrpc(status));
  LogWarning("request {}: worker {} failed after {} tokens ({}); trying another", request_.request_id(),
             failed_.back(), request_.output_size(), status.error_message());
  Dispatch(FromGrpc(status));
}

void Generation::Finish(Status status) {
  if (ended_) return;
  ended_ = true;
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
