#include "engine/core/engine.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <thread>

#include "tests/engine/test_engine.h"

namespace millrace::engine {
namespace {

using ::testing::HasSubstr;

TEST(Engine, ChunkedPrefillGivesTheTokensOfTheWhole) {
  for (const int32_t prompt_tokens : {1, 63, 64, 65, 128, 500}) {
    for (const int32_t batch_tokens_max : {80, 128, 1000}) {
      EngineOptions options = Options();
      options.batch_tokens_max = batch_tokens_max;
      TestEngine engine(20, options);
      const EngineRequest request = Request(static_cast<RequestId>(prompt_tokens), prompt_tokens, 70);
      ExpectAnswer(request, *engine.Generate(request));
      engine.ExpectAllFree();
    }
  }
}

TEST(Engine, BatchedGivesTheTokensOfAlone) {
  TestEngine engine(200);
  std::vector<std::pair<EngineRequest, std::shared_ptr<Recording>>> live;
  for (RequestId id = 1; id <= 40; ++id) {
    EngineRequest request =
        Request(id, static_cast<int32_t>(1 + id * 17 % 300), static_cast<int32_t>(1 + id * 11 % 90));
    request.sampling.temperature = id % 3 == 0 ? 0.0f : 1.0f;
    request.sampling.ignore_eos = id % 2 == 0;
    live.emplace_back(request, engine.Generate(request));
  }
  for (auto& [request, recording] : live) ExpectAnswer(request, *recording);
  engine.ExpectAllFree();
  EXPECT_EQ(engine.engine->Stats().preemptions, 0u);
}

TEST(Engine, EndsAtStopTokensMaxTokensAndTheContext) {
  TestEngine engine(40);
  EngineRequest request = Request(1, 10, 50);
  const std::vector<int32_t> tokens = ExpectedAnswer(request).tokens;
  request.id = 2;
  request.sampling.stop_token_ids = {tokens[5]};
  const auto stopped = engine.Generate(request);
  ExpectAnswer(request, *stopped);
  EXPECT_EQ(stopped->finish(), FinishReason::kStop);
  EXPECT_LE(stopped->tokens().size(), 6u);
  const EngineRequest far = Request(3, 1000, 500);
  const auto cut = engine.Generate(far);
  ExpectAnswer(far, *cut);
  EXPECT_EQ(cut->tokens().size(), static_cast<size_t>(kFakeContext - 1000));
  EXPECT_EQ(cut->finish(), FinishReason::kLength);
}

TEST(Engine, ContinuesAnAnswerWhereAnotherEngineLeftIt) {
  TestEngine engine(40);
  EngineRequest request = Request(1, 100, 90);
  const FakeAnswer whole = ExpectedAnswer(request);
  for (const size_t done : {1u, 28u, 29u, 89u}) {
    request.id = 10 + done;
    request.output.assign(whole.tokens.begin(), whole.tokens.begin() + static_cast<ptrdiff_t>(done));
    const auto recording = engine.Generate(request);
    EXPECT_EQ(recording->AwaitEnd(), OkStatus());
    EXPECT_EQ(recording->tokens(),
              std::vector<int32_t>(whole.tokens.begin() + static_cast<ptrdiff_t>(done), whole.tokens.end()));
  }
}

TEST(Engine, PreemptionKeepsTheTokens) {
  TestEngine engine(10);  // the answers need 3 pages each
  std::vector<std::pair<EngineRequest, std::shared_ptr<Recording>>> live;
  engine.backend->Close();
  for (RequestId id = 1; id <= 8; ++id) {
    EngineRequest request = Request(id, 40, 140);
    request.priority = id == 8 ? 1 : 0;
    live.emplace_back(request, engine.Generate(request));
  }
  engine.backend->Open();
  for (auto& [request, recording] : live) ExpectAnswer(request, *recording);
  EXPECT_GT(engine.Settled().preemptions, 0u);
  engine.ExpectAllFree();
}

TEST(Engine, FailsWhatOutgrowsThePool) {
  TestEngine engine(3);
  const auto recording = engine.Generate(Request(1, 100, 500));
  EXPECT_EQ(recording->AwaitEnd().code(), absl::StatusCode::kResourceExhausted);
  EXPECT_EQ(recording->tokens().size(), 3u * 64 - 100 + 1);
  engine.ExpectAllFree();
  const EngineRequest fits = Request(2, 150, 42);  // fills the pool to the last row but one
  ExpectAnswer(fits, *engine.Generate(fits));
}

TEST(Engine, RefusesWhatCanNeverRun) {
  TestEngine engine(4);
  const auto refusal = [&](const EngineRequest& request) {
    auto recording = std::make_shared<Recording>();
    const Status status = engine.engine->Generate(request, std::make_unique<RecordingSink>(recording));
    EXPECT_EQ(recording->AwaitEnd().code(), absl::StatusCode::kInternal) << "destroyed, and uncalled";
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
    return std::string(Message(status));
  };
  EXPECT_THAT(refusal(Request(1, 257, 1)), ::testing::AllOf(HasSubstr("257"), HasSubstr("256")));
  EXPECT_THAT(refusal(Request(1, 1024, 1)),
              ::testing::AllOf(HasSubstr("1024 tokens"), HasSubstr("context of 1024")));
  EXPECT_THAT(refusal(Request(1, 0, 1)), HasSubstr("empty"));
  EXPECT_THAT(refusal(Request(1, 5, 0)), HasSubstr("max_tokens"));
  EngineRequest request = Request(1, 5, 2);
  request.output = {1, 2};
  EXPECT_THAT(refusal(request), HasSubstr("2 tokens already"));
  request = Request(1, 5, 2);
  request.prompt[3] = kFakeVocabularyTokens;
  EXPECT_THAT(refusal(request), ::testing::AllOf(HasSubstr("token 90"), HasSubstr("has 90")));
}

TEST(Engine, RefusesOptionsThatCannotWork) {
  const auto create = [](EngineOptions options) {
    return Engine::Create(options, std::make_unique<FakeBackend>(4), nullptr).status();
  };
  EXPECT_EQ(create(Options()), OkStatus());
  EngineOptions options = Options();
  options.batch_tokens_max = 64;
  EXPECT_THAT(std::string(Message(create(options))), HasSubstr("batch_tokens_max is 64"));
  options = Options();
  options.running_max = 193;
  EXPECT_THAT(std::string(Message(create(options))), HasSubstr("1 to 192"));
  options = Options();
  options.num_vocabulary_tokens = kFakeVocabSize + 1;
  EXPECT_THAT(std::string(Message(create(options))), HasSubstr("num_vocabulary_tokens"));
}

TEST(Engine, AnswersFullWhenTheQueueIsFull) {
  EngineOptions options = Options();
  options.running_max = 1;
  options.waiting_max = 3;
  TestEngine engine(40, options);
  engine.backend->Close();
  std::vector<std::pair<EngineRequest, std::shared_ptr<Recording>>> live;
  live.emplace_back(Request(1, 10, 5), engine.Generate(Request(1, 10, 5)));
  engine.backend->AwaitForward(1);  // runs: no longer in the queue
  for (RequestId id = 2; id <= 4; ++id)
    live.emplace_back(Request(id, 10, 5), engine.Generate(Request(id, 10, 5)));
  auto recording = std::make_shared<Recording>();
  EXPECT_EQ(engine.engine->Generate(Request(5, 10, 5), std::make_unique<RecordingSink>(recording)).code(),
            absl::StatusCode::kResourceExhausted);
  EXPECT_EQ(recording->AwaitEnd().code(), absl::StatusCode::kInternal) << "destroyed, and uncalled";
  engine.backend->Open();
  for (auto& [request, each] : live) ExpectAnswer(request, *each);
  ExpectAnswer(Request(6, 10, 5), *engine.Generate(Request(6, 10, 5)));
}

TEST(Engine, RunsHigherPrioritiesFirst) {
  EngineOptions options = Options();
  options.running_max = 1;
  TestEngine engine(40, options);
  engine.backend->Close();
  const auto running = engine.Generate(Request(1, 10, 2));
  engine.backend->AwaitForward(1);
  const auto low = engine.Generate(Request(2, 10, 2));
  EngineRequest urgent = Request(3, 10, 2);
  urgent.priority = 5;
  const auto high = engine.Generate(urgent);
  engine.backend->LetThrough(4);  // two steps each for the running one and the next
  EXPECT_EQ(high->AwaitEnd(), OkStatus());
  EXPECT_FALSE(low->ended());
  engine.backend->Open();
  EXPECT_EQ(low->AwaitEnd(), OkStatus());
}

TEST(Engine, CancelWorksInEveryPhase) {
  EngineOptions options = Options();
  options.running_max = 2;
  TestEngine engine(40, options);
  engine.backend->Close();
  const auto prefilling = engine.Generate(Request(1, 500, 50));
  engine.backend->AwaitForward(1);
  engine.engine->Cancel(1);
  engine.backend->LetThrough(1);
  EXPECT_EQ(prefilling->AwaitEnd().code(), absl::StatusCode::kCancelled);
  EXPECT_TRUE(prefilling->tokens().empty());
  engine.backend->Open();
  engine.ExpectAllFree();

  const auto decoding = engine.Generate(Request(2, 10, 1000));
  decoding->AwaitTokens(3);
  engine.backend->Close();
  const auto second = engine.Generate(Request(3, 10, 1000));
  const auto waiting = engine.Generate(Request(4, 10, 1000));
  engine.engine->Cancel(4);
  engine.engine->Cancel(3);
  engine.engine->Cancel(2);
  engine.engine->Cancel(2);  // has ended: ignored
  engine.engine->Cancel(77);
  engine.backend->Open();
  for (const auto& each : {decoding, second, waiting}) {
    EXPECT_EQ(each->AwaitEnd().code(), absl::StatusCode::kCancelled);
  }
  engine.ExpectAllFree();

  // A cancelled prefill request: the ticket's hold stays until released, and a release before any page is
  // harmless.
  engine.backend->Close();
  const int32_t forwards = engine.backend->forwards();
  const auto first = engine.Prefill(Request(5, 500, 5));
  engine.backend->AwaitForward(forwards + 1);
  engine.engine->Cancel(5);
  engine.backend->Open();
  EXPECT_EQ(first->AwaitEnd().code(), absl::StatusCode::kCancelled);
  EXPECT_EQ(engine.Settled().pages_ticket_only, PagesFor(500));
  engine.engine->ReleaseTicket(5);
  engine.engine->ReleaseTicket(5);
  engine.ExpectAllFree();

  // Imports: before a grant, with a grant that waits, and with pages.
  const auto bare = engine.BeginImport(Request(6, 100, 5));
  engine.engine->Cancel(6);
  EXPECT_EQ(bare->AwaitEnd().code(), absl::StatusCode::kCancelled);
  EXPECT_EQ(engine.Grant(6, 1).status().code(), absl::StatusCode::kNotFound);
  const auto holder = engine.BeginImport(Request(7, 1000, 5));
  ASSERT_TRUE(engine.Grant(7, 16).ok());
  const auto other = engine.BeginImport(Request(8, 1000, 5));
  ASSERT_TRUE(engine.Grant(8, 16).ok());
  const auto asking = engine.BeginImport(Request(9, 1000, 5));
  auto grant = engine.GrantLater(9, 16);
  engine.engine->Cancel(9);
  EXPECT_EQ(grant.get().status().code(), absl::StatusCode::kNotFound);
  engine.engine->Cancel(7);
  engine.engine->FinishImport(7, {}, false);  // too late: ignored
  engine.engine->Cancel(8);
  for (const auto& each : {holder, other, asking})
    EXPECT_EQ(each->AwaitEnd().code(), absl::StatusCode::kCancelled);
  EXPECT_EQ(engine.Settled().pages_ticket_only, 32);
  engine.engine->ReleaseTicket(8);
  engine.engine->ReleaseTicket(7);
  engine.ExpectAllFree();
}

TEST(Engine, NeverRunsExpiredWork) {
  FakeClock clock;
  EngineOptions options = Options();
  options.clock = &clock;
  options.running_max = 2;
  TestEngine engine(40, options);
  const auto expiring = [&](RequestId id, int32_t seconds) {
    EngineRequest request = Request(id, 10, 1000);
    request.deadline = clock.Now() + std::chrono::seconds(seconds);
    return request;
  };
  const auto dead = engine.Generate(expiring(1, 0));
  EXPECT_EQ(dead->AwaitEnd().code(), absl::StatusCode::kDeadlineExceeded);
  EXPECT_EQ(engine.backend->forwards(), 0);

  engine.backend->Close();
  const auto running = engine.Generate(expiring(2, 10));
  engine.backend->AwaitForward(1);
  engine.backend->LetThrough(5);
  running->AwaitTokens(5);
  engine.backend->AwaitForward(6);
  clock.Advance(std::chrono::seconds(11));
  engine.backend->LetThrough(1);
  EXPECT_EQ(running->AwaitEnd().code(), absl::StatusCode::kDeadlineExceeded);
  EXPECT_EQ(engine.backend->forwards(), 6);
  engine.backend->Open();

  // An import that nobody completes; the engine has nothing to run and still looks at the clock.
  const auto import = engine.BeginImport(expiring(3, 10));
  ASSERT_TRUE(engine.Grant(3, 1).ok());
  clock.Advance(std::chrono::seconds(11));
  EXPECT_EQ(import->AwaitEnd().code(), absl::StatusCode::kDeadlineExceeded);
  EXPECT_EQ(engine.Settled().pages_ticket_only, 1);
  engine.engine->ReleaseTicket(3);
  engine.ExpectAllFree();
}

TEST(Engine, NoticesThatItMakesNoProgress) {
  FakeClock clock;
  EngineOptions options = Options();
  options.clock = &clock;
  TestEngine engine(40, options);
  clock.Advance(std::chrono::hours(1));
  // Its thread may not have come to sleep for the first time yet.
  const TimePoint until = Clock::System().Now() + std::chrono::seconds(30);
  while (!engine.engine->MakingProgress(std::chrono::seconds(1)) && Clock::System().Now() < until)
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  EXPECT_TRUE(engine.engine->MakingProgress(std::chrono::seconds(1))) << "idle is no stall";
  engine.backend->Close();
  const auto recording = engine.Generate(Request(1, 10, 2));
  engine.backend->AwaitForward(1);
  EXPECT_TRUE(engine.engine->MakingProgress(std::chrono::seconds(1)));
  clock.Advance(std::chrono::seconds(2));
  EXPECT_FALSE(engine.engine->MakingProgress(std::chrono::seconds(1)));
  engine.backend->LetThrough(1);
  engine.backend->AwaitForward(2);
  EXPECT_TRUE(engine.engine->MakingProgress(std::chrono::seconds(1)));
  engine.backend->Open();
  EXPECT_EQ(recording->AwaitEnd(), OkStatus());
}

TEST(Engine, BackendErrorEndsEveryRequest) {
  TestEngine engine(40);
  engine.backend->Close();
  const auto running = engine.Generate(Request(1, 10, 20));
  const auto import = engine.BeginImport(Request(2, 10, 20));
  engine.backend->AwaitForward(1);
  engine.backend->FailWith(Internal("the device is gone"));
  engine.backend->Open();
  EXPECT_THAT(std::string(Message(running->AwaitEnd())), HasSubstr("the device is gone"));
  EXPECT_FALSE(import->AwaitEnd().ok());
  EXPECT_EQ(engine.Generate(Request(3, 10, 20))->AwaitEnd().code(), absl::StatusCode::kInternal);
  EXPECT_FALSE(engine.engine->MakingProgress(std::chrono::hours(1)));
}

TEST(Engine, TakesTheTokensThatTheBackendDraws) {
  TestEngine engine(40);
  engine.backend->DrawGreedyTokens();
  EngineRequest greedy = Request(1, 70, 30), masked = Request(2, 70, 30), warm = Request(3, 70, 30);
  greedy.sampling.temperature = masked.sampling.temperature = 0;
  masked.sampling.ignore_eos = false;
  masked.sampling.min_tokens = 20;  // only Sample masks end tokens
  const auto first = engine.Generate(greedy);
  const auto second = engine.Generate(masked);
  const auto third = engine.Generate(warm);
  ExpectAnswer(greedy, *first);
  ExpectAnswer(masked, *second);
  ExpectAnswer(warm, *third);
}

// Chunked, beside others, preempted, and although the cache has the prompt: what each of the prompt's tokens
// had for log-probability.
TEST(Engine, TellsThePromptsLogprobs) {
  TestEngine engine(16);
  std::vector<std::pair<EngineRequest, std::shared_ptr<Recording>>> live;
  for (const int32_t prompt_tokens : {300, 1, 2, 64, 65, 300, 128}) {
    EngineRequest request = Request(static_cast<RequestId>(live.size() + 1), prompt_tokens, 40);
    request.prompt = RandomTokens(prompt_tokens, 5);  // they begin alike
    request.sampling.prompt_logprobs = live.size() != 3;
    request.sampling.num_logprobs = 2;
    live.emplace_back(request, engine.Generate(request));
  }
  for (auto& [request, recording] : live) {
    ExpectAnswer(request, *recording);
    const std::vector<SampledToken> scores = recording->prompt();
    ASSERT_EQ(scores.size(), request.sampling.prompt_logprobs ? request.prompt.size() - 1 : 0);
    for (size_t i = 0; i < scores.size(); ++i) {
      const std::vector<float> logits = FakeLogitsAfter(std::span(request.prompt).first(i + 1));
      const SampledToken expected = Score(logits, kFakeVocabularyTokens, request.prompt[i + 1], 2);
      EXPECT_EQ(scores[i].token, request.prompt[i + 1]);
      EXPECT_EQ(scores[i].logprob, expected.logprob)
          << "prompt of " << request.prompt.size() << ", token " << i + 1;
      ASSERT_EQ(scores[i].top.size(), 2u);
      EXPECT_EQ(scores[i].top[0].token, expected.top[0].token);
    }
  }
  engine.ExpectAllFree();
}

TEST(Engine, DestructionCancelsWhatIsLeft) {
  std::vector<std::shared_ptr<Recording>> recordings;
  std::future<StatusOr<GrantedPages>> grant;
  {
    EngineOptions options = Options();
    options.running_max = 1;
    TestEngine engine(40, options);
    recordings.push_back(engine.Generate(Request(1, 10, 1000)));
    recordings.push_back(engine.Generate(Request(2, 10, 1000)));
    recordings.push_back(engine.BeginImport(Request(3, 10, 1000)));
    grant = engine.GrantLater(3, 1);
    recordings[0]->AwaitTokens(1);
  }
  for (const auto& recording : recordings)
    EXPECT_EQ(recording->AwaitEnd().code(), absl::StatusCode::kCancelled);
  EXPECT_FALSE(grant.get().ok());
}

TEST(Engine, TellsMetrics) {
  Metrics metrics;
  {
    TestEngine engine(40, Options(), &metrics);
    EXPECT_EQ(engine.Generate(Request(1, 100, 5))->AwaitEnd(), OkStatus());
    engine.Settled();
  }
  const std::string text = metrics.Text();
  EXPECT_THAT(text, HasSubstr("millrace_engine_pages 40\n"));
  EXPECT_THAT(text, HasSubstr("millrace_engine_pages_free 40\n"));
  EXPECT_THAT(text, HasSubstr("millrace_engine_steps_total 5\n"));
  EXPECT_THAT(text, HasSubstr("millrace_engine_prompt_tokens_total 100\n"));
  EXPECT_THAT(text, HasSubstr("millrace_engine_output_tokens_total 5\n"));
  EXPECT_THAT(text, HasSubstr("millrace_engine_step_seconds_count 5\n"));
  EXPECT_THAT(text, HasSubstr("millrace_engine_batch_tokens_sum 104\n"));
}

TEST(Engine, StandsManyThreadsAtOnce) {
  TestEngine engine(30);
  std::vector<std::thread> threads;
  for (uint64_t thread = 0; thread < 4; ++thread) {
    threads.emplace_back([&engine, thread] {
      for (uint64_t i = 0; i < 20; ++i) {
        const EngineRequest request = Request(thread * 100 + i, static_cast<int32_t>(1 + i * 13), 20);
        const auto recording = engine.Generate(request);
        if (i % 4 == 3) {
          engine.engine->Cancel(request.id);
          (void)recording->AwaitEnd();  // may have been quicker than the cancel
        } else {
          ExpectAnswer(request, *recording);
        }
        engine.engine->Stats();
        engine.engine->MakingProgress(std::chrono::seconds(1));
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  engine.ExpectAllFree();
}

}  // namespace
}  // namespace millrace::engine
