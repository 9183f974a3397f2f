#include "engine/sampling/sampler.h"

#include <algorithm>
#include <cmath>
#include <initializer_list>
#include <limits>
#include <utility>
#include <vector>

#include "base/check.h"
#include "base/random.h"
#include "engine/sampling/distribution.h"
#include "engine/sampling/logit_kernels.h"

namespace millrace::engine {
namespace {

constexpr float kMasked = -std::numeric_limits<float>::infinity();
struct Candidate {
  float logit;
  int32_t token;
};

bool MoreLikely(const Candidate& a, const Candidate& b) {
  return a.logit > b.logit || (a.logit == b.logit && a.token < b.token);
}

// Per thread and reused: a step allocates nothing large.
struct Scratch {
  std::vector<float> logits;
  std::vector<int32_t> counts;  // all zero between calls
  Distribution distribution;
};
Scratch& ThreadScratch() {
  thread_local Scratch scratch;
  return scratch;
}

bool NeedsAdjustment(const SampleInput& input, const SamplingParams& params) {
  return params.mask != nullptr || !params.logit_bias.empty() || params.repetition_penalty != 1 ||
         params.presence_penalty != 0 || params.frequency_penalty != 0 ||
         (static_cast<int32_t>(input.output.size()) < params.min_tokens && !input.end_tokens.empty());
}

// Calls visit(token, count) once per distinct token of `spans`, with the number of its occurrences.
template <typename Visit>
void ForEachDistinct(std::initializer_list<std::span<const int32_t>> spans, int32_t num_tokens,
                     std::vector<int32_t>* counts, const Visit& visit) {
  counts->resize(std::max(counts->size(), static_cast<size_t>(num_tokens)));
  for (const auto& span : spans) {
    for (const int32_t token : span) {
      if (token >= 0 && token < num_tokens) ++(*counts)[static_cast<size_t>(token)];
    }
  }
  for (const auto& span : spans) {
    for (const int32_t token : span) {
      if (token < 0 || token >= num_tokens) continue;
      const int32_t count = std::exchange((*counts)[static_cast<size_t>(token)], 0);
      if (count > 0) visit(token, count);
    }
  }
}

// Takes away what the mask does not allow; ends are allowed by it alone.
void ApplyMask(const SampleInput& input, TokenMask& mask, std::vector<float>* logits) {
  const TokenMask::Allowed allowed = mask.After(input.output);
  const auto is_end = [&](size_t token) {
    return std::find(input.end_tokens.begin(), input.end_tokens.end(), static_cast<int32_t>(token)) !=
           input.end_tokens.end();
  };
  for (size_t first = 0; first < logits->size(); first += 64) {
    const uint64_t word = first / 64 < allowed.tokens.size() ? allowed.tokens[first / 64] : 0;
    if (word == ~uint64_t{0}) continue;
    const size_t last = std::min(first + 64, logits->size());
    for (size_t token = first; token < last; ++token) {
      if ((word >> (token - first) & 1U) == 0 && !(allowed.may_end && is_end(token)))
        (*logits)[token] = kMasked;
    }
  }
}

// Logit bias, penalties, the mask of min_tokens and that of a constraint, on a copy.
std::span<const float> Adjust(std::span<const float> logits, const SampleInput& input,
                              const SamplingParams& params, Scratch* scratch) {
  const auto num_tokens = static_cast<int32_t>(logits.size());
  std::vector<float>& adjusted = scratch->logits;
  adjusted.assign(logits.begin(), logits.end());
  for (const auto& [token, bias] : params.logit_bias) {
    if (token >= 0 && token < num_tokens) adjusted[static_cast<size_t>(token)] += bias;
  }
  if (params.repetition_penalty != 1) {
    ForEachDistinct({input.prompt, input.output}, num_tokens, &scratch->counts, [&](int32_t token, int32_t) {
      float& logit = adjusted[static_cast<size_t>(token)];
      logit = logit > 0 ? logit / params.repetition_penalty : logit * params.repetition_penalty;
    });
  }
  if (params.presence_penalty != 0 || params.frequency_penalty != 0) {
    ForEachDistinct({input.output}, num_tokens, &scratch->counts, [&](int32_t token, int32_t count) {
      adjusted[static_cast<size_t>(token)] -=
          params.presence_penalty + params.frequency_penalty * static_cast<float>(count);
    });
  }
  if (static_cast<int32_t>(input.output.size()) < params.min_tokens) {
    for (const int32_t token : input.end_tokens) {
      if (token >= 0 && token < num_tokens) adjusted[static_cast<size_t>(token)] = kMasked;
    }
  }
  if (params.mask != nullptr) ApplyMask(input, *params.mask, &adjusted);
  return adjusted;
}

int32_t Draw(std::span<const float> logits, int32_t best, const SamplingParams& params, double uniform,
             Distribution* distribution) {
  distribution->Assign(logits, logits[static_cast<size_t>(best)],
                       1.0 / static_cast<double>(params.temperature));
  if (distribution->size() == 0) return best;
  Distribution::Prefix kept{distribution->size(), distribution->total()};
  if (params.top_k > 0 && params.top_k < kept.count) kept = distribution->Take(params.top_k);
  // The best token weighs 1, so min_p bounds the weight itself. Both cut the tail.
  if (params.top_p < 1 || params.min_p > 0) {
    kept = distribution->Take(kept.count, static_cast<double>(params.top_p) * kept.mass,
                              static_cast<double>(params.min_p));
  }
  return distribution->Pick(kept.count, uniform * kept.mass);
}

void FillLogprobs(std::span<const float> logits, float best_logit, int32_t num_logprobs,
                  Distribution* distribution, SampledToken* sampled) {
  distribution->Assign(logits, best_logit, 1);
  const double normalizer = static_cast<double>(best_logit) + std::log(distribution->total());
  const auto logprob = [&](int32_t token) {
    return static_cast<float>(static_cast<double>(logits[static_cast<size_t>(token)]) - normalizer);
  };
  sampled->logprob = logprob(sampled->token);
  if (num_logprobs == 0) return;
  std::vector<Candidate> top;  // sorted; at most num_logprobs + 1
  for (size_t i = 0; i < logits.size(); ++i) {
    if (!(logits[i] > kMasked)) continue;
    const bool full = static_cast<int32_t>(top.size()) == num_logprobs;
    if (full && !(logits[i] > top.back().logit)) continue;
    const Candidate candidate{logits[i], static_cast<int32_t>(i)};
    top.insert(std::upper_bound(top.begin(), top.end(), candidate, MoreLikely), candidate);
    if (full) top.pop_back();
  }
  sampled->top.reserve(top.size());
  for (const Candidate& candidate : top) sampled->top.push_back({candidate.token, logprob(candidate.token)});
}

}  // namespace

SampledToken Score(std::span<const float> logits, int32_t num_tokens_in_vocabulary, int32_t token,
                   int32_t num_logprobs) {
  const auto drawable = logits.first(static_cast<size_t>(num_tokens_in_vocabulary));
  SampledToken scored;
  scored.token = token;
  FillLogprobs(drawable, drawable[static_cast<size_t>(BestLogitKernels().arg_max(drawable))], num_logprobs,
               &ThreadScratch().distribution, &scored);
  return scored;
}

SampledToken Sample(const SampleInput& input, const SamplingParams& params) {
  Scratch& scratch = ThreadScratch();
  MR_CHECK(input.num_tokens_in_vocabulary > 0 &&
               static_cast<size_t>(input.num_tokens_in_vocabulary) <= input.logits.size(),
           "{} tokens, {} logits", input.num_tokens_in_vocabulary, input.logits.size());
  std::span<const float> logits = input.logits.first(static_cast<size_t>(input.num_tokens_in_vocabulary));
  if (NeedsAdjustment(input, params)) logits = Adjust(logits, input, params, &scratch);
  const int32_t best = BestLogitKernels().arg_max(logits);
  const float best_logit = logits[static_cast<size_t>(best)];
  SampledToken sampled;
  sampled.token = best;
  const bool drawable = best_logit > kMasked;  // false only when every token is masked
  if (params.temperature > 0 && drawable) {
    const double uniform = UniformAt(params.seed, input.output.size());
    sampled.token = Draw(logits, best, params, uniform, &scratch.distribution);
  }
  if (params.num_logprobs >= 0 && drawable) {
    FillLogprobs(logits, best_logit, params.num_logprobs, &scratch.distribution, &sampled);
  }
  return sampled;
}

}  // namespace millrace::engine
