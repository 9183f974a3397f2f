#include "server/rpc/convert.h"

#include <gtest/gtest.h>

#include <functional>
#include <limits>

namespace millrace::server {
namespace {

rpc::GenerateRequest Valid() {
  rpc::GenerateRequest message;
  message.add_prompt(3);
  SamplingToProto({}, message.mutable_sampling());
  return message;
}

TEST(RequestFromProto, KeepsEveryField) {
  engine::SamplingParams params;
  params.temperature = 0.5f;
  params.top_p = 0.25f;
  params.top_k = 7;
  params.min_p = 0.125f;
  params.repetition_penalty = 1.5f;
  params.presence_penalty = -1;
  params.frequency_penalty = 2;
  params.seed = ~uint64_t{0};
  params.max_tokens = 9;
  params.min_tokens = 2;
  params.ignore_eos = true;
  params.stop_token_ids = {4, 5};
  params.logit_bias = {{6, -3.0f}};
  params.num_logprobs = 0;
  params.prompt_logprobs = true;
  params.constraint = R"({"type":"json_object"})";
  rpc::GenerateRequest message = Valid();
  SamplingToProto(params, message.mutable_sampling());
  message.add_output(8);
  message.set_priority(-2);
  message.set_cache_salt("salt");
  message.set_timeout_us(1'000'000);
  const TimePoint now(std::chrono::seconds(100));
  const auto request = RequestFromProto(message, 42, now);
  ASSERT_TRUE(request.ok());
  EXPECT_EQ(request->id, 42u);
  EXPECT_EQ(request->prompt, std::vector<int32_t>{3});
  EXPECT_EQ(request->output, std::vector<int32_t>{8});
  EXPECT_EQ(request->priority, -2);
  EXPECT_EQ(request->cache_salt, "salt");
  EXPECT_EQ(request->deadline, now + std::chrono::seconds(1));
  const engine::SamplingParams& got = request->sampling;
  EXPECT_EQ(
      std::tie(got.temperature, got.top_p, got.top_k, got.min_p, got.repetition_penalty, got.presence_penalty,
               got.frequency_penalty, got.seed, got.max_tokens, got.min_tokens, got.ignore_eos,
               got.stop_token_ids, got.logit_bias, got.num_logprobs, got.prompt_logprobs, got.constraint),
      std::tie(params.temperature, params.top_p, params.top_k, params.min_p, params.repetition_penalty,
               params.presence_penalty, params.frequency_penalty, params.seed, params.max_tokens,
               params.min_tokens, params.ignore_eos, params.stop_token_ids, params.logit_bias,
               params.num_logprobs, params.prompt_logprobs, params.constraint));
}

TEST(RequestFromProto, RefusesWhatNoEdgeWouldSend) {
  const float nan = std::numeric_limits<float>::quiet_NaN();
  const std::vector<std::pair<const char*, std::function<void(rpc::GenerateRequest*)>>> cases = {
      {"prompt", [](auto* m) { m->clear_prompt(); }},
      {"timeout_us", [](auto* m) { m->set_timeout_us(-1); }},
      {"temperature", [&](auto* m) { m->mutable_sampling()->set_temperature(nan); }},
      {"temperature", [](auto* m) { m->mutable_sampling()->set_temperature(-1); }},
      {"top_p", [](auto* m) { m->mutable_sampling()->set_top_p(0); }},
      {"top_p", [&](auto* m) { m->mutable_sampling()->set_top_p(nan); }},
      {"top_k", [](auto* m) { m->mutable_sampling()->set_top_k(-1); }},
      {"min_p", [](auto* m) { m->mutable_sampling()->set_min_p(2); }},
      {"repetition_penalty", [](auto* m) { m->mutable_sampling()->set_repetition_penalty(0); }},
      {"presence_penalty", [&](auto* m) { m->mutable_sampling()->set_presence_penalty(nan); }},
      {"frequency_penalty", [&](auto* m) { m->mutable_sampling()->set_frequency_penalty(nan); }},
      {"max_tokens", [](auto* m) { m->mutable_sampling()->set_max_tokens(0); }},
      {"min_tokens", [](auto* m) { m->mutable_sampling()->set_min_tokens(-1); }},
      {"num_logprobs", [](auto* m) { m->mutable_sampling()->set_num_logprobs(21); }},
      {"prompt_logprobs",
       [](auto* m) {
         m->mutable_sampling()->set_prompt_logprobs(true);
         m->add_prefill("10.0.0.1:1");
       }},
      {"logit_bias", [&](auto* m) { m->mutable_sampling()->add_logit_bias()->set_bias(nan); }},
  };
  for (const auto& [field, damage] : cases) {
    rpc::GenerateRequest message = Valid();
    ASSERT_TRUE(RequestFromProto(message, 1, TimePoint()).ok());
    damage(&message);
    const auto request = RequestFromProto(message, 1, TimePoint());
    ASSERT_FALSE(request.ok()) << field;
    EXPECT_EQ(Message(request.status()).substr(0, std::string(field).size()), field);
  }
}

TEST(RequestFromProto, AnEndlessTimeoutDoesNotOverflow) {
  rpc::GenerateRequest message = Valid();
  message.set_timeout_us(std::numeric_limits<int64_t>::max());
  const TimePoint now(std::chrono::seconds(100));
  EXPECT_GT(RequestFromProto(message, 1, now)->deadline, now);
}

TEST(TokenToProto, RoundTrips) {
  for (const auto finish :
       {engine::FinishReason::kNone, engine::FinishReason::kStop, engine::FinishReason::kLength}) {
    engine::TokenEvent event{4, {17, -0.5f, {{17, -0.5f}, {2, -1.5f}}}, finish};
    event.prompt = {{3, -2.5f, {}}, {9, -0.25f, {{8, -0.125f}}}};
    rpc::Token message;
    TokenToProto(event, &message);
    const engine::TokenEvent back = TokenFromProto(message);
    EXPECT_EQ(back.index, 4);
    EXPECT_EQ(back.token.token, 17);
    EXPECT_EQ(back.token.logprob, -0.5f);
    ASSERT_EQ(back.token.top.size(), 2u);
    EXPECT_EQ(back.token.top[1].token, 2);
    EXPECT_EQ(back.finish, finish);
    ASSERT_EQ(back.prompt.size(), 2u);
    EXPECT_EQ(back.prompt[0].logprob, -2.5f);
    ASSERT_EQ(back.prompt[1].top.size(), 1u);
    EXPECT_EQ(back.prompt[1].top[0].token, 8);
  }
}

TEST(PagesToProto, JoinsRunsAndRoundTrips) {
  const std::vector<engine::PageId> pages = {4, 5, 6, 2, 9, 8};
  rpc::PrefillCommand::Grant message;
  PagesToProto(pages, &message);
  EXPECT_EQ(message.pages_size(), 4);
  EXPECT_EQ(*PagesFromProto(message, 10, 6), pages);
  EXPECT_FALSE(PagesFromProto(message, 9, 6).ok());   // page 9 of 9
  EXPECT_FALSE(PagesFromProto(message, 10, 5).ok());  // one more than is left
  EXPECT_FALSE(PagesFromProto(rpc::PrefillCommand::Grant(), 10, 5).ok());
  rpc::PrefillCommand::Grant huge;
  huge.add_pages()->set_first(1);
  huge.mutable_pages(0)->set_count(std::numeric_limits<uint32_t>::max());
  EXPECT_FALSE(PagesFromProto(huge, 10, 5).ok());
}

TEST(TimeoutUs, IsWhatIsLeftAndNeverNone) {
  const TimePoint now(std::chrono::seconds(5));
  EXPECT_EQ(TimeoutUs(kNoDeadline, now), 0);
  EXPECT_EQ(TimeoutUs(now + std::chrono::milliseconds(2), now), 2000);
  EXPECT_EQ(TimeoutUs(now - std::chrono::seconds(1), now), 1);
}

}  // namespace
}  // namespace millrace::server
