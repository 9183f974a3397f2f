// cache_bench: conversations that share a beginning and take turns, against the prefix cache and its tiers.
//
//   cache_bench --model deploy/models/ling-tiny
//
// Each turn sends the whole conversation so far and a new question; conversations alternate, so that by the
// time one comes back the others have used the pool. Time to first token of all turns but the first ones,
// with the cache off, in the pool only, with host memory below it, and with a file below that. "expected" is
// what a plain model of the trace finds: one LRU list of pages as long as all tiers together.

#include <fmt/format.h>

#include <CLI/CLI.hpp>
#include <list>
#include <unordered_map>

#include "base/check.h"
#include "base/random.h"
#include "engine/kv/page_keys.h"
#include "tests/bench/engine_on_model.h"

namespace millrace::engine {
namespace {

struct Options {
  std::string model = "deploy/models/ling-tiny";
  int threads = 2;
  int conversations = 10;
  int turns = 7;
  int system_tokens = 320;
  int question_tokens = 120;
  int answer_tokens = 40;
  int pool_pages = 48;
  int host_pages = 64;
  int disk_pages = 160;
  int repeats = 3;
};

// Pages in the order of their last use, as many as all tiers hold.
class TraceModel {
 public:
  explicit TraceModel(int capacity) : capacity_(static_cast<size_t>(capacity)) {}

  // Tokens found of a prompt, and then all of the text is kept.
  int32_t Serve(const std::vector<int32_t>& prompt, const std::vector<int32_t>& text) {
    std::vector<uint64_t> keys;
    ExtendPageKeys(0, text, &keys);
    const size_t found_max = (prompt.size() - 1) / kPageTokens;
    size_t found = 0;
    while (found < std::min(found_max, keys.size()) && places_.contains(keys[found])) ++found;
    for (auto key = keys.rbegin(); key != keys.rend(); ++key) Use(*key);  // the end goes first
    // The page that is being written is not one of these.
    while (order_.size() + 1 > capacity_) {
      places_.erase(order_.front());
      order_.pop_front();
    }
    return static_cast<int32_t>(found) * kPageTokens;
  }

 private:
  void Use(uint64_t key) {
    if (const auto place = places_.find(key); place != places_.end()) order_.erase(place->second);
    places_[key] = order_.insert(order_.end(), key);
  }
  const size_t capacity_;
  std::list<uint64_t> order_;
  std::unordered_map<uint64_t, std::list<uint64_t>::iterator> places_;
};

std::vector<int32_t> RandomText(int count, int32_t num_tokens, Random* random) {
  std::vector<int32_t> tokens(static_cast<size_t>(count));
  for (int32_t& token : tokens)
    token = static_cast<int32_t>(random->Below(static_cast<uint64_t>(num_tokens)));
  return tokens;
}

struct Outcome {
  std::vector<double> first_token_ms;  // of later turns
  int64_t asked = 0, found = 0, expected = 0;
  EngineStats stats;
};

Outcome Play(const BenchModel& model, const Options& options, const EngineOptions& engine_options,
             int capacity) {
  const auto engine = model.Start(engine_options, options.pool_pages, options.threads);
  const int32_t num_tokens = model.tokenizer->size();
  Random random(7);
  const std::vector<int32_t> system = RandomText(options.system_tokens, num_tokens, &random);
  std::vector<std::vector<int32_t>> texts(static_cast<size_t>(options.conversations), system);
  TraceModel trace(engine_options.prefix_cache ? capacity : 1);
  Outcome outcome;
  EngineRequest request;
  request.sampling.temperature = 0;
  request.sampling.ignore_eos = true;
  request.sampling.max_tokens = options.answer_tokens;
  for (int turn = 0; turn < options.turns; ++turn) {
    for (std::vector<int32_t>& text : texts) {
      const auto question = RandomText(options.question_tokens, num_tokens, &random);
      text.insert(text.end(), question.begin(), question.end());
      ++request.id;
      request.prompt = text;
      const BenchAnswer answer = AskAll(engine.get(), {request})[0];
      text.insert(text.end(), answer.tokens.begin(), answer.tokens.end());
      outcome.expected += trace.Serve(request.prompt, {text.begin(), text.end() - 1});
      outcome.asked += static_cast<int64_t>(request.prompt.size());
      outcome.found += answer.cached_tokens;
      if (turn > 0) outcome.first_token_ms.push_back(answer.first_token_seconds * 1e3);
    }
  }
  outcome.stats = engine->Stats();
  return outcome;
}

void Run(const Options& options) {
  const BenchModel model(options.model);
  const size_t page_bytes = model.page_bytes(false);
  struct Setting {
    const char* name;
    bool cache;
    int host, disk;
  };
  const std::vector<Setting> settings = {
      {"off", false, 0, 0},
      {"pool only", true, 0, 0},
      {"pool + host", true, options.host_pages, 0},
      {"pool + host + file", true, options.host_pages, options.disk_pages}};
  fmt::print(
      "{} conversations of {} turns, {} shared tokens, {} + {} a turn; {} pages of {} KiB in the pool\n",
      options.conversations, options.turns, options.system_tokens, options.question_tokens,
      options.answer_tokens, options.pool_pages, page_bytes / 1024);
  fmt::print("{:20} {:>9} {:>9} {:>9} {:>18} {:>8} {:>8} {:>8} {:>8}\n", "tiers", "ttft p50", "p95", "x off",
             "p50 of each repeat", "found", "expected", "loaded", "fetched");
  double off = 0;
  for (const Setting& setting : settings) {
    EngineOptions engine;
    engine.prefix_cache = setting.cache;
    engine.host_tier_bytes = static_cast<size_t>(setting.host) * page_bytes;
    engine.disk_tier_bytes = static_cast<size_t>(setting.disk) * page_bytes;
    engine.disk_tier_directory = "/var/tmp";
    std::vector<double> all, medians;
    Outcome last;
    for (int repeat = 0; repeat < options.repeats; ++repeat) {
      last = Play(model, options, engine, options.pool_pages + setting.host + setting.disk);
      medians.push_back(Percentile(last.first_token_ms, 0.5));
      all.insert(all.end(), last.first_token_ms.begin(), last.first_token_ms.end());
    }
    const double median = Percentile(all, 0.5);
    if (!setting.cache) off = median;
    const auto share = [&](int64_t tokens) {
      return 100.0 * static_cast<double>(tokens) / static_cast<double>(last.asked);
    };
    fmt::print(
        "{:20} {:>6.1f} ms {:>6.1f} ms {:>9.2f} {:>11.1f} to {:.1f} {:>6.1f} % {:>6.1f} % {:>8} {:>8}\n",
        setting.name, median, Percentile(all, 0.95), off / median, Percentile(medians, 0),
        Percentile(medians, 1), share(last.found), share(last.expected), last.stats.tiers.loaded,
        last.stats.tiers.fetched);
  }
}

}  // namespace
}  // namespace millrace::engine

int main(int argc, char** argv) {
  millrace::engine::Options options;
  CLI::App app("Time to first token of conversations against the prefix cache and its tiers");
  app.add_option("--model", options.model)->capture_default_str();
  app.add_option("--threads", options.threads)->capture_default_str();
  app.add_option("--conversations", options.conversations)->capture_default_str();
  app.add_option("--turns", options.turns)->capture_default_str();
  app.add_option("--system-tokens", options.system_tokens)->capture_default_str();
  app.add_option("--question-tokens", options.question_tokens)->capture_default_str();
  app.add_option("--answer-tokens", options.answer_tokens)->capture_default_str();
  app.add_option("--pool-pages", options.pool_pages)->capture_default_str();
  app.add_option("--host-pages", options.host_pages)->capture_default_str();
  app.add_option("--disk-pages", options.disk_pages)->capture_default_str();
  app.add_option("--repeats", options.repeats)->capture_default_str();
  CLI11_PARSE(app, argc, argv);
  millrace::engine::Run(options);
}
