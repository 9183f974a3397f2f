// The drawing kernel against the rules of engine/sampling/sampler.cc, written down once more in double.
#include "engine/backend/cuda/kernels/sampling.h"

#include <algorithm>
#include <limits>

#include "tests/engine/cuda/hot/support.h"
#include "tests/engine/cuda/step/tests.h"

namespace millrace::test {
namespace {

using namespace millrace::engine::cuda;  // NOLINT: what is tested

struct Candidate {
  float logit;
  int token;
  double weight;
};

// The token; `margin`: how far the draw was from a neighbour, as a share of the total.
int Reference(const float* logits, const DrawRow& draw, double* margin) {
  *margin = 1;
  float best = -std::numeric_limits<float>::infinity();
  int best_token = -1;
  for (int i = 0; i < draw.num_tokens; ++i) {
    if (logits[i] > best) best = logits[i], best_token = i;
  }
  if (best_token < 0 || draw.inverse_temperature <= 0) return best_token;
  std::vector<Candidate> candidates;
  double total = 0;
  for (int i = 0; i < draw.num_tokens; ++i) {
    const double exponent = (double{logits[i]} - double{best}) * draw.inverse_temperature;
    if (!(exponent >= -40)) continue;
    candidates.push_back({logits[i], i, std::exp(exponent)});
    total += candidates.back().weight;
  }
  std::sort(candidates.begin(), candidates.end(), [](const Candidate& x, const Candidate& y) {
    return x.logit > y.logit || (x.logit == y.logit && x.token < y.token);
  });
  if (draw.top_k > 0 && static_cast<size_t>(draw.top_k) < candidates.size()) {
    candidates.resize(draw.top_k);
    total = 0;
    for (const Candidate& c : candidates) total += c.weight;
  }
  if (draw.top_p < 1 || draw.min_p > 0) {
    const double mass = double{draw.top_p} * total;
    double kept = 0;
    size_t count = 0;
    while (count < candidates.size() &&
           (count == 0 || (kept < mass && candidates[count].weight >= draw.min_p))) {
      *margin = std::min(*margin, std::fabs(kept - mass) / total);
      kept += candidates[count++].weight;
    }
    *margin = std::min(*margin, std::fabs(kept - mass) / total);
    candidates.resize(count);
    total = kept;
  }
  const double target = draw.uniform * total;
  double below = 0;
  for (size_t i = 0; i + 1 < candidates.size(); ++i) {
    below += candidates[i].weight;
    *margin = std::min(*margin, std::fabs(below - target) / total);
    if (below > target) return candidates[i].token;
  }
  return candidates.back().token;
}

void TestDraws(int vocab, float spread, uint32_t seed) {
  std::mt19937 engine(seed);
  std::uniform_real_distribution<double> uniform(0, 1);
  std::normal_distribution<float> normal(0, spread);
  std::vector<DrawRow> draws;
  for (const double inverse_temperature : {0.0, 1.0, 0.5, 1.4}) {
    for (const int top_k : {0, 1, 50, 2000}) {
      for (const float top_p : {1.0f, 0.9f, 0.3f}) {
        for (const float min_p : {0.0f, 0.05f}) {
          DrawRow draw;
          draw.uniform = uniform(engine);
          draw.inverse_temperature = inverse_temperature;
          draw.top_k = top_k;
          draw.top_p = top_p;
          draw.min_p = min_p;
          draw.num_tokens = vocab - 7;
          draws.push_back(draw);
        }
      }
    }
  }
  draws.push_back(DrawRow());  // asks for nothing
  const int rows = static_cast<int>(draws.size());
  std::vector<float> logits(static_cast<size_t>(rows) * vocab);
  for (size_t i = 0; i < logits.size(); ++i) {
    // Ids without a token are the likeliest, a few logits are equal, some are masked.
    const int token = static_cast<int>(i % vocab);
    logits[i] = token >= vocab - 7 ? 100 : std::round(normal(engine) * 64) / 64;
    if (token % 13 == 5) logits[i] = -std::numeric_limits<float>::infinity();
  }
  Device<float> device_logits(logits);
  Device<DrawRow> device_draws(draws);
  Device<int32_t> tokens(rows);
  CUDA_OK(LaunchDraw({device_logits.get(), vocab, device_draws.get(), tokens.get(), rows}, nullptr));
  const std::vector<int32_t> got = tokens.Get();
  int left_to_host = 0, close = 0;
  for (int r = 0; r < rows; ++r) {
    if (draws[r].num_tokens == 0) {
      EXPECT(got[r] == -1, "row %d drew %d unasked", r, got[r]);
      continue;
    }
    double margin = 0;
    const int want = Reference(logits.data() + int64_t{r} * vocab, draws[r], &margin);
    if (got[r] == -1 && vocab > kDrawCandidatesMax) {
      ++left_to_host;
      continue;
    }
    close += margin <= 1e-9;
    EXPECT(got[r] == want || margin <= 1e-9, "vocab %d row %d: %d, not %d (margin %.1e)", vocab, r, got[r],
           want, margin);
  }
  std::printf("draws from %d: %d of %d left to the host, %d too close to call\n", vocab, left_to_host, rows,
              close);
  EXPECT(left_to_host * 2 <= rows && close * 10 <= rows, "%d left, %d close", left_to_host, close);
}

// How often each token comes, over many uniform numbers: the expected counts within five standard deviations.
void TestFrequencies() {
  constexpr int kVocab = 40, kDraws = 20000;
  std::mt19937_64 engine(5);
  std::uniform_real_distribution<double> uniform(0, 1);
  std::vector<float> logits(kVocab), all;
  for (int i = 0; i < kVocab; ++i) logits[i] = static_cast<float>(i % 7) * 0.5f;
  std::vector<DrawRow> draws(kDraws);
  for (DrawRow& draw : draws) {
    draw.uniform = uniform(engine);
    draw.num_tokens = kVocab;
    all.insert(all.end(), logits.begin(), logits.end());
  }
  Device<float> device_logits(all);
  Device<DrawRow> device_draws(draws);
  Device<int32_t> tokens(kDraws);
  CUDA_OK(LaunchDraw({device_logits.get(), kVocab, device_draws.get(), tokens.get(), kDraws}, nullptr));
  std::vector<int> counts(kVocab);
  for (const int32_t token : tokens.Get()) {
    EXPECT(token >= 0 && token < kVocab, "drew %d", token);
    if (token >= 0 && token < kVocab) ++counts[token];
  }
  double total = 0;
  for (const float logit : logits) total += std::exp(double{logit});
  for (int i = 0; i < kVocab; ++i) {
    const double share = std::exp(double{logits[i]}) / total;
    const double deviation = std::sqrt(kDraws * share * (1 - share));
    EXPECT(std::fabs(counts[i] - kDraws * share) < 5 * deviation, "token %d came %d times, not about %.0f", i,
           counts[i], kDraws * share);
  }
}

}  // namespace

void TestSampling() {
  for (const int vocab : {64, 1000, 4096, 157184}) TestDraws(vocab, 3, vocab);
  TestFrequencies();
}

}  // namespace millrace::test
