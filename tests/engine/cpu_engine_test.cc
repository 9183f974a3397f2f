// The whole engine on the CPU backend: what compute threads do beside the model.

#include <gtest/gtest.h>

#include "base/random.h"
#include "engine/backend/cpu/cpu_backend.h"
#include "tests/bench/random_model.h"
#include "tests/engine/recording_sink.h"

namespace millrace::engine {
namespace {

constexpr int32_t kVocabulary = 2048;  // rows of logits; the last few have no token
constexpr int32_t kTokens = kVocabulary - 3;

class EveryFifth final : public TokenMask {
 public:
  Allowed After(std::span<const int32_t> output) override {
    words_.assign(kVocabulary / 64, 0);
    for (size_t token = output.size() % 5; token < kVocabulary; token += 5)
      words_[token / 64] |= uint64_t{1} << token % 64;
    return {words_, false};
  }

 private:
  std::vector<uint64_t> words_;
};

// All that sampling can be asked for, some with everything at once.
std::vector<EngineRequest> Requests() {
  std::vector<EngineRequest> requests;
  Random random(3);
  for (RequestId id = 1; id <= 24; ++id) {
    EngineRequest& request = requests.emplace_back();
    request.id = id;
    for (RequestId i = 0; i < id * 3; ++i)
      request.prompt.push_back(static_cast<int32_t>(random.Below(kTokens)));
    SamplingParams& sampling = request.sampling;
    sampling.seed = id;
    sampling.ignore_eos = true;
    sampling.max_tokens = 12;
    sampling.temperature = id % 4 == 0 ? 0.0f : 0.9f;
    if (id % 3 == 0) sampling.top_p = 0.8f;
    if (id % 5 == 0) sampling.top_k = 40;
    if (id % 2 == 0) sampling.num_logprobs = 3;
    if (id % 6 == 0) sampling.repetition_penalty = 1.2f;
    if (id % 7 == 0) sampling.mask = std::make_shared<EveryFifth>();
    sampling.prompt_logprobs = id % 8 == 0;
  }
  return requests;
}

std::vector<std::shared_ptr<Recording>> Answers(const std::shared_ptr<const Weights>& weights, int threads) {
  CpuBackendOptions backend;
  backend.num_threads = threads;
  backend.num_pages = 200;
  EngineOptions options;
  options.num_vocabulary_tokens = kTokens;
  backend.batch_tokens_max = options.batch_tokens_max;
  backend.logit_rows_max = options.running_max + kScoredRowsMax;
  auto cpu = MakeCpuBackend(weights, backend);
  EXPECT_TRUE(cpu.ok()) << Message(cpu.status());
  auto engine = Engine::Create(options, *std::move(cpu), nullptr);
  EXPECT_TRUE(engine.ok()) << Message(engine.status());
  std::vector<std::shared_ptr<Recording>> answers;
  for (const EngineRequest& request : Requests()) {
    answers.push_back(std::make_shared<Recording>());
    EXPECT_EQ((*engine)->Generate(request, std::make_unique<RecordingSink>(answers.back())), OkStatus());
  }
  for (const auto& answer : answers) EXPECT_EQ(answer->AwaitEnd(), OkStatus());
  return answers;
}

TEST(CpuEngine, ThreadsThatSampleTogetherDrawTheSame) {
  ModelConfig config = *ShapeNamed("ling-bench-s", 2);
  config.hidden_size = config.intermediate_size = 64;
  config.moe_intermediate_size = config.shared_intermediate_size = 64;
  config.num_heads = 2;
  config.num_kv_heads = 1;
  config.vocab_size = kVocabulary;
  config.eos_token_ids = {0};
  auto weights = LoadCpuWeights(RandomTensors(7), config, {});
  ASSERT_TRUE(weights.ok()) << Message(weights.status());
  const auto expected = Answers(*weights, 1);
  for (const int threads : {2, 4}) {
    const auto answers = Answers(*weights, threads);
    for (size_t i = 0; i < expected.size(); ++i) {
      EXPECT_EQ(answers[i]->tokens(), expected[i]->tokens()) << i;
      const std::vector<SampledToken> scores = answers[i]->prompt(), wanted = expected[i]->prompt();
      ASSERT_EQ(scores.size(), wanted.size());
      EXPECT_EQ(scores.empty(), (i + 1) % 8 != 0);
      for (size_t t = 0; t < scores.size(); ++t) EXPECT_EQ(scores[t].logprob, wanted[t].logprob) << i << t;
    }
  }
}

}  // namespace
}  // namespace millrace::engine
