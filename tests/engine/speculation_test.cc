#include "engine/scheduler/speculation.h"

#include <gtest/gtest.h>

#include <cstring>

#include "engine/core/engine_core.h"
#include "tests/engine/slow_backend.h"
#include "tests/engine/test_engine.h"

namespace millrace::engine {
namespace {

using std::chrono::milliseconds;

EngineOptions Speculating() {
  EngineOptions options = Options();
  options.speculate = true;
  return options;
}

// Whatever the drafts were, the tokens are those of sampling alone; and a right draft saves a step.
TEST(Speculation, ChangesNoTokenAndSavesSteps) {
  for (const float temperature : {0.0f, 0.7f, 1.5f}) {
    for (const int32_t prompt_tokens : {1, 63, 64, 65, 128, 500}) {
      TestEngine engine(30, Speculating());
      EngineRequest request = Request(static_cast<RequestId>(prompt_tokens), prompt_tokens, 150);
      request.sampling.temperature = temperature;
      request.sampling.top_p = 0.9f;
      request.sampling.repetition_penalty = 1.1f;
      ExpectAnswer(request, *engine.Generate(request));
      const EngineStats stats = engine.Settled();
      EXPECT_GT(stats.drafted_tokens, 0u);
      EXPECT_GT(stats.accepted_tokens, stats.drafted_tokens / 2);
      EXPECT_LE(stats.accepted_tokens, stats.drafted_tokens);
      EXPECT_EQ(stats.output_tokens, 150u);
      EXPECT_LT(stats.steps, 150u - stats.accepted_tokens / 2);
      EXPECT_EQ(engine.backend->wrong_mtp_rows(), 0);
      engine.ExpectAllFree();
    }
  }
}

// Allows every third token, other ones after every token of the answer. Nothing changes in it, so that the
// test may ask too.
class EveryThird final : public TokenMask {
 public:
  EveryThird() {
    for (size_t rest = 0; rest < 3; ++rest) {
      words_[rest].assign((kFakeVocabSize + 63) / 64, 0);
      for (size_t token = rest; token < kFakeVocabSize; token += 3)
        words_[rest][token / 64] |= uint64_t{1} << token % 64;
    }
  }
  Allowed After(std::span<const int32_t> output) override { return {words_[output.size() % 3], false}; }

 private:
  std::vector<uint64_t> words_[3];
};

// A mask holds for what is drafted, for what is drawn, and where a backend could draw by itself.
TEST(Speculation, HoldsAMask) {
  for (const float temperature : {0.0f, 1.5f}) {
    TestEngine engine(30, Speculating());
    engine.backend->DrawGreedyTokens();
    EngineRequest request = Request(9, 65, 150);
    request.sampling.temperature = temperature;
    request.sampling.ignore_eos = true;
    request.sampling.mask = std::make_shared<EveryThird>();
    const auto answer = engine.Generate(request);
    ExpectAnswer(request, *answer);
    ASSERT_EQ(answer->tokens().size(), 150u);
    for (size_t i = 0; i < 150; ++i) EXPECT_EQ(static_cast<size_t>(answer->tokens()[i]) % 3, i % 3) << i;
    EXPECT_GT(engine.Settled().accepted_tokens, 0u);
    engine.ExpectAllFree();
  }
}

TEST(Speculation, HoldsInBatchesWithStopTokensAndPreemption) {
  EngineOptions options = Speculating();
  options.running_max = 6;
  TestEngine engine(12, options);
  std::vector<std::pair<EngineRequest, std::shared_ptr<Recording>>> live;
  for (RequestId id = 1; id <= 30; ++id) {
    EngineRequest request =
        Request(id, static_cast<int32_t>(1 + id * 17 % 200), static_cast<int32_t>(1 + id * 11 % 90));
    request.sampling.ignore_eos = id % 2 == 0;
    live.emplace_back(request, engine.Generate(request));
  }
  for (auto& [request, recording] : live) ExpectAnswer(request, *recording);
  EXPECT_GT(engine.Settled().accepted_tokens, 0u);
  EXPECT_EQ(engine.backend->wrong_mtp_rows(), 0);
  engine.ExpectAllFree();
}

// The MTP layer's KV and the last row's hidden state come with the prompt: the decode worker drafts at once.
TEST(Speculation, CrossesFromPrefillToDecode) {
  for (const int32_t prompt_tokens : {1, 64, 65, 300}) {
    for (const bool with_hidden : {true, false}) {
      TestEngine prefill(20, Speculating()), decode(20, Speculating());
      EngineRequest request = Request(5, prompt_tokens, 60);
      if (with_hidden) request.sampling.mask = std::make_shared<EveryThird>();
      const auto first = prefill.Prefill(request);
      const auto answer = decode.BeginImport(request);
      const auto granted = decode.Grant(5, PagesFor(prompt_tokens));
      ASSERT_TRUE(granted.ok());
      ASSERT_EQ(first->AwaitEnd(), OkStatus());
      ASSERT_EQ(first->mtp_hidden().size(), static_cast<size_t>(kFakeHidden));
      const KvLayout& a = prefill.engine->kv_layout();
      const KvLayout& b = decode.engine->kv_layout();
      for (const LayerEvent& event : first->layers()) {
        for (size_t i = 0; i < event.pages.size(); ++i) {
          const PageId to = (*granted)[static_cast<size_t>(event.first_page) + i];
          std::memcpy(decode.engine->kv_memory().data() + b.piece_offset(event.layer, to),
                      prefill.engine->kv_memory().data() + a.piece_offset(event.layer, event.pages[i]),
                      a.piece_bytes());
        }
      }
      prefill.engine->ReleaseTicket(5);
      SampledToken token;
      token.token = first->tokens()[0];
      decode.engine->FinishImport(5, token, false, with_hidden ? first->mtp_hidden() : std::vector<float>());
      decode.engine->ReleaseTicket(5);
      ExpectAnswer(request, *answer);
      EXPECT_EQ(decode.Settled().accepted_tokens > 0, with_hidden);
      EXPECT_EQ(decode.backend->wrong_mtp_rows(), 0);
    }
  }
}

TEST(SpeculationGauge, TakesTheFasterWayAndLooksAgain) {
  for (const bool drafts_pay : {true, false}) {
    SpeculationGauge gauge;
    bool pay = drafts_pay;
    int drafted = 0, steps = 0;
    const auto run = [&](int count) {
      drafted = 0;
      for (steps = 0; steps < count; ++steps) {
        const bool use = gauge.Use(3);
        drafted += use;
        gauge.OnStep(3, use ? 3 : 0, use, use ? 5 : 3, use ? milliseconds(pay ? 12 : 30) : milliseconds(10));
      }
    };
    run(2000);
    EXPECT_EQ(drafted > 1000, drafts_pay) << drafted;
    EXPECT_LT(std::min(drafted, steps - drafted), 100) << "trials and probes are few";
    pay = !pay;
    run(20'000);
    run(2000);
    EXPECT_EQ(drafted > 1000, !drafts_pay) << drafted;
  }
}

// While drafts do not pay, prompts do without the MTP layer's rows, but for those that come when it is time
// to look again.
TEST(Speculation, CostsPromptsNothingWhileItDoesNotPay) {
  FakeClock clock;
  SlowBackend backend(30, &clock, milliseconds(1));  // a draft costs as much as a token
  EngineOptions options = Speculating();
  options.clock = &clock;
  options.prefix_cache = false;
  EngineCore core(options, &backend);
  constexpr int kRequests = 40, kPrompt = 100, kAnswer = 60;
  int filled = 0;
  for (RequestId id = 1; id <= kRequests; ++id) {
    const int64_t before = backend.mtp_rows();
    const EngineRequest request = Request(id, kPrompt, kAnswer);
    const auto recording = std::make_shared<Recording>();
    core.Submit(SequenceRole::kGenerate, request, std::make_unique<RecordingSink>(recording), nullptr);
    while (core.Prepare()) ASSERT_EQ(core.Run(), OkStatus());
    ExpectAnswer(request, *recording);
    const int64_t rows = backend.mtp_rows() - before;
    EXPECT_TRUE(rows == 0 || rows == kPrompt - 1) << rows;
    filled += rows > 0 ? 1 : 0;
    if (id == 1) {
      EXPECT_GT(rows, 0) << "nobody knows yet";
    }
  }
  // 40 answers are 2,400 steps: two probes, each in the first prompt after it is due.
  EXPECT_GE(filled, 2);
  EXPECT_LE(filled, 6);
}

TEST(SpeculationGauge, IsNotMisledByAnInterruptedStep) {
  SpeculationGauge gauge;
  int drafted = 0;
  for (int step = 0; step < 2'000; ++step) {
    const bool use = gauge.Use(1);
    drafted += use;
    // Drafts cost more than they bring, but now and then a step without them waits for something else.
    gauge.OnStep(1, use ? 1 : 0, use, use ? 2 : 1, milliseconds(use ? 25 : step % 25 == 7 ? 1'000 : 10));
  }
  EXPECT_LE(drafted, 100);
}

TEST(SpeculationGauge, FillsPromptsWhileItTriesProbesOrDrafts) {
  SpeculationGauge gauge;
  EXPECT_TRUE(gauge.Fill());
  bool fill = true;  // of the text that decodes
  int filled = 0, drafted = 0;
  const auto run = [&](int steps, bool pay) {
    filled = drafted = 0;
    for (int step = 0; step < steps; ++step) {
      if (step % 50 == 0) filled += fill = gauge.Fill();
      const bool use = gauge.Use(1);
      const int drafts = use && fill ? 1 : 0;
      drafted += drafts;
      gauge.OnStep(1, drafts, use, 1 + drafts, milliseconds(drafts == 0 ? 10 : pay ? 12 : 30));
    }
  };
  run(20'000, false);
  EXPECT_LE(filled, 24) << "of 400";
  EXPECT_LE(drafted, 160);
  run(20'000, true);
  run(2'000, true);
  EXPECT_EQ(filled, 40);
  EXPECT_GT(drafted, 1'900);
}

}  // namespace
}  // namespace millrace::engine
