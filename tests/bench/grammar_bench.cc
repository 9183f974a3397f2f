// What a constraint costs: compiling it, the first visit of a state, and each token after that, beside a
// plain draw.
//
//   build/release/tests/bench/grammar_bench deploy/models/ling-tiny
//   tests/bench/large_vocabulary.py /tmp/large && build/release/tests/bench/grammar_bench /tmp/large
//
// A name behind the checkpoint measures that constraint alone. Answers are drawn at random under the mask.
// The limit shown is the time to read and write one row of logits from memory at 10 GB/s, which any mask has
// to do.

#include <fmt/core.h>

#include <algorithm>
#include <chrono>
#include <string>
#include <vector>

#include "base/random.h"
#include "engine/grammar/constraint.h"
#include "engine/grammar/grammar_mask.h"
#include "engine/sampling/sampler.h"

namespace millrace::engine {
namespace {

using Clock = std::chrono::steady_clock;

double Microseconds(Clock::duration d) { return std::chrono::duration<double, std::micro>(d).count(); }

double Median(std::vector<double> values) {
  if (values.empty()) return 0;
  std::nth_element(values.begin(), values.begin() + static_cast<ptrdiff_t>(values.size() / 2), values.end());
  return values[values.size() / 2];
}

double Percentile99(std::vector<double> values) {
  if (values.empty()) return 0;
  std::sort(values.begin(), values.end());
  return values[values.size() * 99 / 100];
}

// What a form of many fields asks for: 60 objects of seven fields each.
std::string LargeSchema() {
  std::string values;
  for (int i = 0; i < 20; ++i) values += fmt::format("{}\"choice number {}\"", i == 0 ? "" : ",", i);
  const std::string fields = R"({"type":"object","properties":{"name":{"type":"string","maxLength":40},
      "kind":{"enum":[)" + values +
                             R"(]},"count":{"type":"integer","minimum":0,"maximum":100000},
      "when":{"type":"string","format":"date-time"},"id":{"type":"string","format":"uuid"},
      "tags":{"type":"array","items":{"type":"string","maxLength":20},"maxItems":5},
      "ratio":{"type":["number","null"]}},"required":["name","kind","count","when","id","tags"]})";
  std::string properties, required;
  for (int i = 0; i < 60; ++i) {
    properties += fmt::format("{}\"field_{}\":{}", i == 0 ? "" : ",", i, fields);
    required += fmt::format("{}\"field_{}\"", i == 0 ? "" : ",", i);
  }
  return R"({"type":"json_schema","schema":{"type":"object","properties":{)" + properties +
         R"(},"required":[)" + required + "]}}";
}

const std::pair<const char*, const char*> kConstraints[] = {
    {"json_object", R"({"type":"json_object"})"},
    {"schema",
     R"({"type":"json_schema","schema":{"type":"object","properties":{"name":{"type":"string"},"age":{"type":"integer"},
        "address":{"type":"object","properties":{"street":{"type":"string"},"city":{"type":"string"}},"required":["street","city"]},
        "tags":{"type":"array","items":{"type":"string"}}},"required":["name","age","address","tags"]}})"},
    {"schema, 500 chars",
     R"({"type":"json_schema","schema":{"type":"string","minLength":400,"maxLength":500}})"},
    {"regex", R"({"type":"regex","pattern":"([A-Z][a-z]+ ){3,200}"})"},
    {"choice", R"({"type":"choice","choices":["positive","negative","neutral"]})"},
};

void Measure(const Tokenizer& tokenizer, const char* name, const char* constraint) {
  constexpr int kRuns = 20;
  constexpr size_t kTokensMax = 200;
  GrammarCache cache(tokenizer);
  const auto compile_begin = Clock::now();
  auto first = cache.MaskFor(constraint);
  const double compile_us = Microseconds(Clock::now() - compile_begin);
  if (!first.ok()) {
    fmt::print("{}: {}\n", name, Message(first.status()));
    return;
  }
  std::vector<float> logits(static_cast<size_t>(tokenizer.size()));
  const std::vector<int32_t> ends = {*tokenizer.Find("<|role_end|>")};
  std::vector<double> cold;
  std::vector<double> warm;
  std::vector<double> plain;
  for (int run = 0; run < kRuns; ++run) {
    SamplingParams params;
    params.seed = static_cast<uint64_t>(run) + 1;
    SamplingParams masked = params;
    masked.mask = *cache.MaskFor(constraint);
    Random random(static_cast<uint64_t>(run));
    std::vector<int32_t> output;
    while (output.size() < kTokensMax) {
      for (float& logit : logits) logit = static_cast<float>(random.Uniform() * 8);
      const SampleInput input{.logits = logits,
                              .prompt = {},
                              .output = output,
                              .end_tokens = ends,
                              .num_tokens_in_vocabulary = tokenizer.size()};
      const auto begin = Clock::now();
      Sample(input, params);
      const auto middle = Clock::now();
      const int32_t token = Sample(input, masked).token;
      const auto end = Clock::now();
      plain.push_back(Microseconds(middle - begin));
      (run == 0 ? cold : warm).push_back(Microseconds(end - middle));
      if (token == ends[0]) break;
      output.push_back(token);
    }
  }
  const double limit_us = 2.0 * static_cast<double>(logits.size() * sizeof(float)) / 10e3;
  fmt::print(
      "{:18} compile {:8.0f} us; per token: plain {:6.1f}, first run {:7.1f} (p99 {:8.1f}), then {:6.1f} "
      "(p99 {:7.1f}), "
      "added {:6.1f} us; row of logits {:.1f} us\n",
      name, compile_us, Median(plain), Median(cold), Percentile99(cold), Median(warm), Percentile99(warm),
      Median(warm) - Median(plain), limit_us);
}

}  // namespace
}  // namespace millrace::engine

int main(int argc, char** argv) {
  using namespace millrace;
  if (argc != 2 && argc != 3) {
    fmt::print(stderr, "usage: grammar_bench CHECKPOINT [NAME]\n");
    return 2;
  }
  const auto tokenizer = engine::Tokenizer::Load(argv[1]);
  if (!tokenizer.ok()) {
    fmt::print(stderr, "{}\n", Message(tokenizer.status()));
    return 1;
  }
  const auto begin = std::chrono::steady_clock::now();
  const engine::TokenTrie trie(**tokenizer);
  fmt::print("{} tokens, trie of {} nodes in {:.0f} us\n", (*tokenizer)->size(), trie.num_nodes(),
             engine::Microseconds(std::chrono::steady_clock::now() - begin));
  const auto wanted = [&](std::string_view name) { return argc == 2 || name == argv[2]; };
  for (const auto& [name, constraint] : engine::kConstraints) {
    if (wanted(name)) engine::Measure(**tokenizer, name, constraint);
  }
  if (!wanted("large schema")) return 0;
  const std::string large = engine::LargeSchema();
  fmt::print("large schema: {} bytes\n", large.size());
  engine::Measure(**tokenizer, "large schema", large.c_str());
  return 0;
}
