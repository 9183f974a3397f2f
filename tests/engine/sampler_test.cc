#include "engine/sampling/sampler.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <map>
#include <numeric>

#include "base/random.h"
#include "engine/sampling/logit_kernels.h"

namespace millrace::engine {
namespace {

SampledToken SampleAt(const std::vector<float>& logits, const SamplingParams& params,
                      std::vector<int32_t> output = {}, std::vector<int32_t> prompt = {},
                      std::vector<int32_t> end_tokens = {}) {
  SampleInput input;
  input.logits = logits;
  input.prompt = prompt;
  input.output = output;
  input.end_tokens = end_tokens;
  input.num_tokens_in_vocabulary = static_cast<int32_t>(logits.size());
  return Sample(input, params);
}

SamplingParams Greedy() {
  SamplingParams params;
  params.temperature = 0;
  return params;
}

// Shares of `draws` draws under as many seeds.
std::map<int32_t, double> Shares(const std::vector<float>& logits, SamplingParams params, int draws = 20000) {
  std::map<int32_t, double> shares;
  for (int i = 0; i < draws; ++i) {
    params.seed = static_cast<uint64_t>(i);
    shares[SampleAt(logits, params).token] += 1.0 / draws;
  }
  return shares;
}

TEST(Sample, GreedyTakesTheLowestOfTheBest) {
  EXPECT_EQ(SampleAt({0, 2, 1, 2}, Greedy()).token, 1);
  EXPECT_EQ(SampleAt({-5}, Greedy()).token, 0);
}

TEST(Sample, NeverDrawsAnIdWithoutToken) {
  const std::vector<float> logits = {0, 1, 9, 9};
  SampleInput input;
  input.logits = logits;
  input.num_tokens_in_vocabulary = 2;
  EXPECT_EQ(Sample(input, Greedy()).token, 1);
  SamplingParams params;
  params.num_logprobs = 4;
  for (params.seed = 0; params.seed < 200; ++params.seed) {
    const SampledToken sampled = Sample(input, params);
    EXPECT_LT(sampled.token, 2);
    EXPECT_EQ(sampled.top.size(), 2u);
  }
}

TEST(Sample, DrawsFollowTheDistribution) {
  const std::vector<float> logits = {std::log(0.5f), std::log(0.3f), std::log(0.2f)};
  auto shares = Shares(logits, {});
  EXPECT_NEAR(shares[0], 0.5, 0.015);
  EXPECT_NEAR(shares[1], 0.3, 0.015);
  EXPECT_NEAR(shares[2], 0.2, 0.015);
  SamplingParams params;
  params.temperature = 0.5;  // squares the odds
  shares = Shares(logits, params);
  EXPECT_NEAR(shares[0], 0.25 / 0.38, 0.015);
  EXPECT_NEAR(shares[2], 0.04 / 0.38, 0.015);
}

TEST(Sample, TopKTopPAndMinPCutTheTail) {
  const std::vector<float> logits = {std::log(0.1f), std::log(0.4f), std::log(0.3f), std::log(0.2f)};
  SamplingParams params;
  params.top_k = 2;
  auto shares = Shares(logits, params);
  EXPECT_EQ(shares.size(), 2u);
  EXPECT_NEAR(shares[1], 4.0 / 7, 0.015);
  params = {};
  params.top_p = 0.6f;  // 0.4 does not reach it, 0.4 + 0.3 does
  EXPECT_EQ(Shares(logits, params).size(), 2u);
  params.top_p = 0.75f;
  EXPECT_EQ(Shares(logits, params).size(), 3u);
  params.top_k = 3;  // top-p counts on what top-k left: 0.4 + 0.3 of 0.9
  EXPECT_EQ(Shares(logits, params).size(), 2u);
  params = {};
  params.min_p = 0.6f;
  shares = Shares(logits, params);
  EXPECT_EQ(shares.size(), 2u);
  EXPECT_NEAR(shares[2], 3.0 / 7, 0.015);
  params = {};
  params.top_p = 1e-6f;
  EXPECT_EQ(Shares(logits, params, 200).size(), 1u);
}

TEST(Sample, TopKKeepsTheLowestIdsOfEquals) {
  SamplingParams params;
  params.top_k = 2;
  const auto shares = Shares({1, 1, 1, 1}, params, 500);
  EXPECT_EQ(shares.size(), 2u);
  EXPECT_TRUE(shares.contains(0) && shares.contains(1));
}

TEST(Sample, DependsOnSeedAndPositionAlone) {
  std::vector<float> logits(1000);
  Random random(1);
  for (float& logit : logits) logit = static_cast<float>(random.Uniform());
  SamplingParams params;
  params.seed = 42;
  const int32_t token = SampleAt(logits, params, {1, 2, 3}).token;
  SampleAt(logits, Greedy());  // nothing is carried over
  EXPECT_EQ(SampleAt(logits, params, {4, 5, 6}).token, token);
  std::map<int32_t, int> tokens;
  for (size_t position = 0; position < 50; ++position) {
    ++tokens[SampleAt(logits, params, std::vector<int32_t>(position)).token];
  }
  EXPECT_GT(tokens.size(), 40u);
}

// The straightforward way: sort all, sum from the top.
int32_t ReferenceDraw(const std::vector<float>& logits, const SamplingParams& params, uint64_t position) {
  std::vector<int32_t> ids(logits.size());
  std::iota(ids.begin(), ids.end(), 0);
  std::stable_sort(ids.begin(), ids.end(), [&](int32_t a, int32_t b) { return logits[a] > logits[b]; });
  if (params.top_k > 0 && params.top_k < static_cast<int32_t>(ids.size())) ids.resize(params.top_k);
  std::vector<double> weights;
  double total = 0;
  for (const int32_t id : ids) {
    weights.push_back(std::exp((double{logits[id]} - double{logits[ids[0]]}) / double{params.temperature}));
    total += weights.back();
  }
  size_t count = 0;
  double kept = 0;
  while (count < ids.size() && (count == 0 || ((params.top_p == 1 || kept < double{params.top_p} * total) &&
                                               weights[count] >= double{params.min_p}))) {
    kept += weights[count++];
  }
  const double target = UniformAt(params.seed, position) * kept;
  double below = 0;
  for (size_t i = 0; i < count; ++i) {
    below += weights[i];
    if (below > target) return ids[i];
  }
  return ids[count - 1];
}

TEST(Sample, AgreesWithSortingEverything) {
  for (uint64_t seed = 1; seed <= 300; ++seed) {
    Random random(seed << 20);
    std::vector<float> logits(1 + random.Below(3000));
    const double spread = 12 * random.Uniform();
    for (float& logit : logits) logit = static_cast<float>(spread * random.Uniform());
    SamplingParams params;
    params.seed = seed;
    params.temperature = static_cast<float>(0.1 + 2 * random.Uniform());
    if (random.Below(2) == 0) params.top_k = 1 + static_cast<int32_t>(random.Below(2000));
    if (random.Below(2) == 0) params.top_p = static_cast<float>(0.01 + 0.98 * random.Uniform());
    if (random.Below(3) == 0) params.min_p = static_cast<float>(0.2 * random.Uniform());
    EXPECT_EQ(SampleAt(logits, params, {7, 7}).token, ReferenceDraw(logits, params, 2)) << "seed " << seed;
  }
}

// As many tokens as a model has, most of them as likely as any other, or all alike.
TEST(Sample, AgreesOnLargeVocabularies) {
  for (uint64_t seed = 1; seed <= 5; ++seed) {
    Random random(seed << 20);
    std::vector<float> logits(157'184);
    const double spread = seed % 4 == 0 ? 0 : 4.0 * static_cast<double>(seed % 4);
    for (float& logit : logits) logit = static_cast<float>(spread * random.Uniform());
    SamplingParams params;
    params.seed = seed;
    if (seed % 3 == 0) params.top_p = 0.9f;
    if (seed % 5 == 0) params.top_k = 40'000;
    if (seed % 2 == 0) params.min_p = 0.01f;
    EXPECT_EQ(SampleAt(logits, params, {7}).token, ReferenceDraw(logits, params, 1)) << "seed " << seed;
  }
}

TEST(LogitKernels, EverySetHasTheSameBitsAndTheyAreRight) {
  const float inf = std::numeric_limits<float>::infinity();
  Random random(5);
  for (size_t count : {1, 2, 7, 8, 9, 15, 16, 17, 63, 64, 65, 1023, 1024, 1025, 3000}) {
    for (int round = 0; round < 20; ++round) {
      std::vector<float> logits(count);
      for (float& logit : logits) logit = static_cast<float>(60 * random.Uniform() - 30);
      for (int i = 0; i < round; ++i) {
        const float odd[] = {std::nanf(""), -inf, 29.5f, -0.0f};
        logits[random.Below(count)] = odd[random.Below(4)];
      }
      if (round == 1) std::fill(logits.begin(), logits.end(), -inf);
      if (round == 2) std::fill(logits.begin(), logits.end(), std::nanf(""));
      size_t best = 0;
      float highest = -inf;
      for (size_t i = 0; i < count; ++i) {
        if (logits[i] > highest) highest = logits[best = i];
      }
      const double inverse = 1 / (0.3 + 2 * random.Uniform());
      std::vector<double> first;
      std::vector<uint8_t> first_buckets;
      for (const LogitKernels& kernels : RunnableLogitKernels()) {
        ASSERT_EQ(kernels.arg_max(logits), static_cast<int32_t>(best)) << kernels.name;
        std::vector<double> weights(count, -1);
        std::vector<uint8_t> buckets(count, 7);
        kernels.weigh(logits, highest, inverse, weights.data(), buckets.data());
        for (size_t i = 0; i < count; ++i) {
          const double exponent = (double{logits[i]} - double{highest}) * inverse;
          const bool weighs = exponent >= kExponentMin;
          const double expected = weighs ? std::exp(exponent) : 0;
          ASSERT_NEAR(weights[i], expected, 1e-15 * expected) << kernels.name << " " << exponent;
          ASSERT_EQ(buckets[i] == kNoBucket, !weighs);
          for (size_t j = 0; j < std::min<size_t>(i, 50); ++j) {
            if (logits[j] > logits[i]) {
              ASSERT_LE(buckets[j], buckets[i]);
            }
          }
        }
        if (first.empty()) {
          first = weights;
          first_buckets = buckets;
        }
        ASSERT_EQ(weights, first) << kernels.name;
        ASSERT_EQ(buckets, first_buckets) << kernels.name;
      }
    }
  }
}

TEST(Sample, PenaltiesCountWhatTheyShould) {
  SamplingParams params = Greedy();
  params.num_logprobs = 3;
  const auto gap = [&](int32_t a, int32_t b, const SampledToken& sampled) {
    std::map<int32_t, float> logprobs;
    for (const TokenLogprob& entry : sampled.top) logprobs[entry.token] = entry.logprob;
    return logprobs[a] - logprobs[b];
  };
  params.presence_penalty = 0.5f;
  params.frequency_penalty = 0.25f;
  // Token 0 twice in the output: 0.5 + 2 * 0.25. Prompt tokens do not count.
  EXPECT_NEAR(gap(0, 1, SampleAt({2, 2, 2}, params, {0, 0}, {1, 1})), -1, 1e-5);
  params.presence_penalty = params.frequency_penalty = 0;
  params.repetition_penalty = 2;
  // Once per token however often it occurs, in the prompt too; negative logits are multiplied.
  EXPECT_NEAR(gap(0, 2, SampleAt({2, -1, 2}, params, {0, 0}, {1})), -1, 1e-5);
  EXPECT_NEAR(gap(1, 2, SampleAt({2, -1, 2}, params, {0, 0}, {1})), -4, 1e-5);
}

TEST(Sample, LogitBiasComesBeforeEverything) {
  SamplingParams params = Greedy();
  params.logit_bias = {{2, 5.0f}, {1, -100.0f}, {77, 1.0f}};
  EXPECT_EQ(SampleAt({1, 3, 0}, params).token, 2);
  params.repetition_penalty = 10;
  EXPECT_EQ(SampleAt({1, 3, 0}, params, {2}).token, 0) << "the bias is penalised too";
}

TEST(Sample, MasksEndTokensBelowMinTokens) {
  SamplingParams params = Greedy();
  params.min_tokens = 2;
  EXPECT_EQ(SampleAt({5, 1, 2}, params, {1}, {}, {0}).token, 2);
  EXPECT_EQ(SampleAt({5, 1, 2}, params, {1, 1}, {}, {0}).token, 0);
  params.temperature = 1;
  for (params.seed = 0; params.seed < 200; ++params.seed) {
    EXPECT_NE(SampleAt({5, 1, 2}, params, {1}, {}, {0}).token, 0);
  }
}

TEST(Sample, LogprobsAreThoseOfTheDistributionAtTemperatureOne) {
  SamplingParams params;
  params.temperature = 0.2f;
  params.top_k = 1;
  params.num_logprobs = 2;
  const SampledToken sampled =
      SampleAt({std::log(0.2f), std::log(0.5f), std::log(0.2f), std::log(0.1f)}, params);
  EXPECT_EQ(sampled.token, 1);
  EXPECT_NEAR(sampled.logprob, std::log(0.5), 1e-5);
  ASSERT_EQ(sampled.top.size(), 2u);
  EXPECT_EQ(sampled.top[0].token, 1);
  EXPECT_EQ(sampled.top[1].token, 0) << "ties go to the lowest id";
  EXPECT_NEAR(sampled.top[1].logprob, std::log(0.2), 1e-5);
  params.num_logprobs = 0;
  EXPECT_TRUE(SampleAt({0, 0}, params).top.empty());
  EXPECT_NEAR(SampleAt({0, 0}, params).logprob, std::log(0.5), 1e-5);
}

TEST(Sample, SurvivesExtremes) {
  const float inf = std::numeric_limits<float>::infinity();
  SamplingParams params;
  params.temperature = 1e-30f;
  EXPECT_EQ(SampleAt({-3e38f, 3e38f, 0}, params).token, 1);
  EXPECT_EQ(SampleAt({std::nanf(""), -inf, 1}, params).token, 2);
  params.temperature = 1e30f;
  EXPECT_LT(SampleAt({-100, 100, 0}, params).token, 3);
}

}  // namespace
}  // namespace millrace::engine
