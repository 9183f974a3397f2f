#include "server/gateway/answer.h"

#include <algorithm>
#include <boost/asio/as_tuple.hpp>
#include <boost/asio/post.hpp>
#include <boost/asio/use_awaitable.hpp>

#include "server/gateway/strand_runner.h"

namespace millrace::server {

namespace net = boost::asio;

Answer::Answer(net::any_io_executor executor, const AnswerContext& context, const ApiRequest& request,
               TimePoint deadline)
    : executor_(std::move(executor)),
      context_(context),
      request_(request),
      deadline_(deadline),
      wake_(executor_),
      queue_limit_(executor_) {
  for (const auto& prompt : request_.prompts) usage_.prompt_tokens += static_cast<int32_t>(prompt.size());
}

std::shared_ptr<Answer> Answer::Start(net::any_io_executor executor, const AnswerContext& context,
                                      const ApiRequest& request, const std::string& key, TimePoint deadline,
                                      const TraceContext& trace) {
  // Shared: the events of its generations find it, or that it is gone.
  std::shared_ptr<Answer> answer(new Answer(std::move(executor), context, request, deadline));
  answer->Enter(key, trace);
  return answer;
}

void Answer::Enter(const std::string& key, const TraceContext& trace) {
  record_.id = request_.id;
  record_.key = key;
  record_.prompt_tokens = usage_.prompt_tokens;
  record_.accepted = Clock::System().Now();
  const char* const operation = request_.endpoint == Endpoint::kCompletions ? "text_completion" : "chat";
  span_ = BeginTrace(context_.tracing, trace, fmt::format("{} {}", operation, context_.model_name),
                     SpanKind::kServer, record_.accepted);
  span_.Set("gen_ai.operation.name", operation);
  context_.log.Put(record_);
  const auto decide = [executor = executor_, weak = weak_from_this()](const Status& status) {
    net::post(executor, [weak, status] {
      const auto self = weak.lock();
      if (self == nullptr || self->ended_) return;
      self->queue_limit_.cancel();
      if (!status.ok()) return self->Fail(status);
      self->admitted_ = true;
      self->Begin();
    });
  };
  ticket_ = context_.admission.Enter({key, request_.priority, request_.num_choices(), usage_.prompt_tokens},
                                     decide);
  if (deadline_ == kNoDeadline) return;
  queue_limit_.expires_at(std::chrono::time_point_cast<std::chrono::steady_clock::duration>(deadline_));
  queue_limit_.async_wait([weak = weak_from_this()](boost::system::error_code error) {
    const auto self = weak.lock();
    if (error || self == nullptr || self->admitted_) return;
    self->Fail(DeadlineExceeded("the request's time was used up in the queue"));
  });
}

// The last word on this answer, and its place for the next one.
void Answer::NoteEnd(const std::string& outcome) {
  ended_ = true;
  queue_limit_.cancel();
  ticket_.Leave(usage_.completion_tokens);
  record_.cached_tokens = usage_.cached_tokens;
  record_.completion_tokens = usage_.completion_tokens;
  for (const Running& running : running_)
    record_.longest_choice_tokens = std::max(record_.longest_choice_tokens, running.choice.num_tokens());
  record_.ended = Clock::System().Now();
  record_.outcome = outcome;
  context_.log.Put(record_);
  context_.metrics.OnEnd(record_);
}

// In the words of OpenTelemetry's conventions for generative AI; never what was said.
void Answer::EndSpan(const Status& status) {
  if (!span_.recording()) return;
  span_.Set("gen_ai.provider.name", "millrace");
  span_.Set("gen_ai.request.model", context_.model_name);
  span_.Set("gen_ai.response.model", context_.model_name);
  span_.Set("gen_ai.response.id", request_.id);
  std::vector<std::string> finishes;
  for (const Running& running : running_) {
    if (running.finished()) finishes.push_back(running.finish);
  }
  span_.Set("gen_ai.response.finish_reasons", std::move(finishes));
  span_.Set("gen_ai.usage.input_tokens", int64_t{usage_.prompt_tokens});
  span_.Set("gen_ai.usage.output_tokens", int64_t{usage_.completion_tokens});
  span_.Set("gen_ai.usage.cache_read.input_tokens", int64_t{usage_.cached_tokens});
  span_.End(status);
}

void Answer::Begin() {
  record_.admitted = Clock::System().Now();
  span_.Child("queue", SpanKind::kInternal, record_.accepted).End(record_.admitted, OkStatus());
  context_.log.Put(record_);
  // Shared by the choices.
  const auto runner = std::make_shared<StrandRunner>(executor_);
  for (int32_t i = 0; i < request_.num_choices(); ++i)
    running_.push_back({Choice(request_, context_.tokenizer, i), nullptr, {}, {}});
  for (size_t i = 0; i < running_.size() && !ended_; ++i) {
    const auto choice = static_cast<int32_t>(i);
    GenerationRequest wanted;
    wanted.id = request_.num_choices() == 1 ? request_.id : fmt::format("{}-{}", request_.id, i);
    wanted.prompt = request_.PromptOf(choice);
    wanted.sampling = request_.SamplingOf(choice);
    wanted.priority = request_.priority;
    wanted.cache_salt = request_.cache_salt;
    wanted.deadline = deadline_;
    wanted.spans = context_.tracing.spans;
    wanted.trace = span_.context();
    running_[i].generation =
        Generation::Create(runner, context_.membership, context_.in_flight, context_.options, wanted,
                           [weak = weak_from_this(), i](const Generation::Event& event) {
                             if (const auto self = weak.lock(); self != nullptr) self->OnEvent(i, event);
                           });
    running_[i].generation->Start();
  }
}

void Answer::NoteToken(size_t index) {
  const TimePoint now = Clock::System().Now();
  if (record_.first_token == TimePoint()) {
    record_.first_token = now;
    context_.log.Put(record_);
  } else if (index == 0 && running_[0].last_token != TimePoint() && record_.second_token == TimePoint()) {
    record_.second_token = now;
  }
  TimePoint& last = running_[index].last_token;
  if (last != TimePoint()) context_.metrics.OnTokenGap(now - last);
  last = now;
}

void Answer::OnEvent(size_t index, const Generation::Event& event) {
  Running& running = running_[index];
  if (ended_ || running.finished()) return;
  if (const auto* end = std::get_if<Generation::End>(&event)) {
    // A generation ends well only after a token that carried a finish.
    return Fail(end->status.ok() ? Internal("an answer ended without a finish reason") : end->status);
  }
  if (const auto* phases = std::get_if<PhaseTimes>(&event)) {
    if (index == 0) record_.phases = *phases;
    return;
  }
  NoteToken(index);
  const auto& token = std::get<engine::TokenEvent>(event);
  // Choices of one prompt share it, so that only the first says what was found of it.
  const bool first_of_prompt = static_cast<int32_t>(index) % request_.n == 0;
  if (first_of_prompt && token.index == 0) usage_.cached_tokens += token.cached_tokens;
  const int32_t reasoning = running.choice.num_reasoning_tokens();
  ChoiceDelta delta = running.choice.Push(token);
  ++usage_.completion_tokens;
  usage_.reasoning_tokens += running.choice.num_reasoning_tokens() - reasoning;
  if (delta.empty()) return;
  running.finish = delta.finish;
  if (running.finished()) context_.metrics.OnFinish(running.finish);
  events_.emplace_back(Step{std::move(delta), usage_});
  if (running.finished()) {
    running.generation->Cancel(Cancelled("the answer is over"));  // a stop string was met
    if (++num_finished_ == running_.size()) {
      NoteEnd("ok");
      EndSpan(OkStatus());
      events_.emplace_back(Done{});
    }
  }
  wake_.cancel();
}

void Answer::Fail(const Status& status) {
  if (ended_) return;
  NoteEnd(absl::StatusCodeToString(status.code()));
  for (Running& running : running_) {
    if (running.generation != nullptr) running.generation->Cancel(status);
  }
  EndSpan(status);
  events_.emplace_back(Failed{status});
  wake_.cancel();
}

void Answer::Cancel(const Status& reason) { Fail(reason); }

net::awaitable<Answer::Event> Answer::Next(Duration wait) {
  if (events_.empty()) {
    wake_.expires_after(std::chrono::duration_cast<std::chrono::steady_clock::duration>(wait));
    co_await wake_.async_wait(net::as_tuple(net::use_awaitable));
  }
  if (events_.empty()) co_return Tick{};
  Event event = std::move(events_.front());
  events_.pop_front();
  co_return event;
}

}  // namespace millrace::server
