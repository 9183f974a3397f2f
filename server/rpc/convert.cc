#include "server/rpc/convert.h"

#include <algorithm>
#include <cmath>
#include <cstring>

namespace millrace::server {
namespace {

Status CheckSampling(const rpc::Sampling& s) {
  if (!std::isfinite(s.temperature()) || s.temperature() < 0) return InvalidArgument("temperature: not >= 0");
  if (!(s.top_p() > 0 && s.top_p() <= 1)) return InvalidArgument("top_p: not in (0, 1]");
  if (s.top_k() < 0) return InvalidArgument("top_k: negative");
  if (!(s.min_p() >= 0 && s.min_p() <= 1)) return InvalidArgument("min_p: not in [0, 1]");
  if (!std::isfinite(s.repetition_penalty()) || s.repetition_penalty() <= 0) {
    return InvalidArgument("repetition_penalty: not > 0");
  }
  if (!std::isfinite(s.presence_penalty())) return InvalidArgument("presence_penalty: not a number");
  if (!std::isfinite(s.frequency_penalty())) return InvalidArgument("frequency_penalty: not a number");
  if (s.max_tokens() < 1) return InvalidArgument("max_tokens: less than 1");
  if (s.min_tokens() < 0) return InvalidArgument("min_tokens: negative");
  if (s.num_logprobs() < -1 || s.num_logprobs() > 20) return InvalidArgument("num_logprobs: not in [-1, 20]");
  for (const rpc::LogitBias& bias : s.logit_bias()) {
    if (!std::isfinite(bias.bias())) return InvalidArgument("logit_bias: not a number");
  }
  return OkStatus();
}

engine::SamplingParams SamplingFromProto(const rpc::Sampling& s) {
  engine::SamplingParams params;
  params.temperature = s.temperature();
  params.top_p = s.top_p();
  params.top_k = s.top_k();
  params.min_p = s.min_p();
  params.repetition_penalty = s.repetition_penalty();
  params.presence_penalty = s.presence_penalty();
  params.frequency_penalty = s.frequency_penalty();
  params.seed = s.seed();
  params.max_tokens = s.max_tokens();
  params.min_tokens = s.min_tokens();
  params.ignore_eos = s.ignore_eos();
  params.stop_token_ids.assign(s.stop_token_ids().begin(), s.stop_token_ids().end());
  for (const rpc::LogitBias& bias : s.logit_bias()) params.logit_bias.emplace_back(bias.token(), bias.bias());
  params.num_logprobs = s.num_logprobs();
  params.prompt_logprobs = s.prompt_logprobs();
  params.constraint = s.constraint();
  return params;
}

}  // namespace

StatusOr<engine::EngineRequest> RequestFromProto(const rpc::GenerateRequest& message, engine::RequestId id,
                                                 TimePoint now) {
  if (message.prompt().empty()) return InvalidArgument("prompt: empty");
  if (message.sampling().prompt_logprobs() && message.prefill_size() > 0)
    return InvalidArgument("prompt_logprobs: a prefill worker does not tell them");
  if (message.timeout_us() < 0) return InvalidArgument("timeout_us: negative");
  MR_RETURN_IF_ERROR(CheckSampling(message.sampling()));
  engine::EngineRequest request;
  request.id = id;
  request.prompt.assign(message.prompt().begin(), message.prompt().end());
  request.output.assign(message.output().begin(), message.output().end());
  request.sampling = SamplingFromProto(message.sampling());
  request.priority = message.priority();
  request.cache_salt = message.cache_salt();
  // A century is for ever, and cannot overflow the clock.
  constexpr int64_t kTimeoutUsMax = int64_t{100} * 365 * 86'400 * 1'000'000;
  if (message.timeout_us() > 0) {
    request.deadline = now + std::chrono::microseconds(std::min(message.timeout_us(), kTimeoutUsMax));
  }
  return request;
}

TraceContext TraceFromProto(const rpc::GenerateRequest& message) {
  return ParseTraceContext(message.traceparent(), message.tracestate());
}

void TraceToProto(const TraceContext& trace, rpc::GenerateRequest* message) {
  message->set_traceparent(trace.traceparent());
  message->set_tracestate(trace.state);
}

void SamplingToProto(const engine::SamplingParams& params, rpc::Sampling* message) {
  message->set_temperature(params.temperature);
  message->set_top_p(params.top_p);
  message->set_top_k(params.top_k);
  message->set_min_p(params.min_p);
  message->set_repetition_penalty(params.repetition_penalty);
  message->set_presence_penalty(params.presence_penalty);
  message->set_frequency_penalty(params.frequency_penalty);
  message->set_seed(params.seed);
  message->set_max_tokens(params.max_tokens);
  message->set_min_tokens(params.min_tokens);
  message->set_ignore_eos(params.ignore_eos);
  message->mutable_stop_token_ids()->Assign(params.stop_token_ids.begin(), params.stop_token_ids.end());
  message->clear_logit_bias();
  for (const auto& [token, value] : params.logit_bias) {
    rpc::LogitBias* bias = message->add_logit_bias();
    bias->set_token(token);
    bias->set_bias(value);
  }
  message->set_num_logprobs(params.num_logprobs);
  message->set_prompt_logprobs(params.prompt_logprobs);
  message->set_constraint(params.constraint);
}

void TokenToProto(const engine::TokenEvent& event, rpc::Token* message) {
  message->set_index(event.index);
  message->set_token(event.token.token);
  message->set_logprob(event.token.logprob);
  message->set_cached_tokens(event.cached_tokens);
  if (!event.mtp_hidden.empty()) {
    message->set_mtp_hidden(event.mtp_hidden.data(), event.mtp_hidden.size() * sizeof(float));
  }
  const auto add_top = [](const engine::TokenLogprob& entry, rpc::TokenLogprob* top) {
    top->set_token(entry.token);
    top->set_logprob(entry.logprob);
  };
  for (const engine::TokenLogprob& entry : event.token.top) add_top(entry, message->add_top());
  for (const engine::SampledToken& token : event.prompt) {
    rpc::PromptToken* const out = message->add_prompt();
    out->set_token(token.token);
    out->set_logprob(token.logprob);
    for (const engine::TokenLogprob& entry : token.top) add_top(entry, out->add_top());
  }
  switch (event.finish) {
    case engine::FinishReason::kNone:
      message->set_finish(rpc::NOT_FINISHED);
      break;
    case engine::FinishReason::kStop:
      message->set_finish(rpc::STOP);
      break;
    case engine::FinishReason::kLength:
      message->set_finish(rpc::LENGTH);
      break;
  }
}

engine::TokenEvent TokenFromProto(const rpc::Token& message) {
  engine::TokenEvent event;
  event.index = message.index();
  event.token.token = message.token();
  event.token.logprob = message.logprob();
  event.cached_tokens = message.cached_tokens();
  event.mtp_hidden.resize(message.mtp_hidden().size() / sizeof(float));
  std::memcpy(event.mtp_hidden.data(), message.mtp_hidden().data(), event.mtp_hidden.size() * sizeof(float));
  for (const rpc::TokenLogprob& top : message.top()) event.token.top.push_back({top.token(), top.logprob()});
  for (const rpc::PromptToken& token : message.prompt()) {
    engine::SampledToken& out = event.prompt.emplace_back();
    out.token = token.token();
    out.logprob = token.logprob();
    for (const rpc::TokenLogprob& top : token.top()) out.top.push_back({top.token(), top.logprob()});
  }
  if (message.finish() == rpc::STOP) event.finish = engine::FinishReason::kStop;
  if (message.finish() == rpc::LENGTH) event.finish = engine::FinishReason::kLength;
  return event;
}

void PagesToProto(std::span<const engine::PageId> pages, rpc::PrefillCommand::Grant* message) {
  rpc::PageRange* range = nullptr;
  for (const engine::PageId page : pages) {
    const auto id = static_cast<uint32_t>(page);
    if (range == nullptr || range->first() + range->count() != id) {
      range = message->add_pages();
      range->set_first(id);
    }
    range->set_count(range->count() + 1);
  }
}

StatusOr<std::vector<engine::PageId>> PagesFromProto(const rpc::PrefillCommand::Grant& message,
                                                     int32_t num_pages, int32_t count_max) {
  std::vector<engine::PageId> pages;
  for (const rpc::PageRange& range : message.pages()) {
    const uint64_t end = uint64_t{range.first()} + range.count();
    if (end > static_cast<uint64_t>(num_pages)) {
      return InvalidArgument("grant: pages {} to {} of a pool of {}", range.first(), end, num_pages);
    }
    if (pages.size() + range.count() > static_cast<size_t>(count_max)) {
      return InvalidArgument("grant: more pages than the {} that are left", count_max);
    }
    for (uint64_t page = range.first(); page < end; ++page)
      pages.push_back(static_cast<engine::PageId>(page));
  }
  if (pages.empty()) return InvalidArgument("grant: no pages");
  return pages;
}

int64_t TimeoutUs(TimePoint deadline, TimePoint now) {
  if (deadline == kNoDeadline) return 0;
  const auto left = std::chrono::duration_cast<std::chrono::microseconds>(deadline - now).count();
  return std::max<int64_t>(left, 1);
}

}  // namespace millrace::server
