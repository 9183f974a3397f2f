// speculation_bench: answers of a checkpoint with an MTP layer, with and without its drafts.
//
//   speculation_bench --model deploy/models/ling-tiny
//
// The questions are the first of the checkpoint's samples.json. The runs alternate, so that what else the
// machine does meets both alike.

#include <fmt/format.h>

#include <CLI/CLI.hpp>
#include <fstream>
#include <sstream>

#include "base/check.h"
#include "base/json.h"
#include "engine/tokenizer/chat_format.h"
#include "tests/bench/engine_on_model.h"

namespace millrace::engine {
namespace {

struct Options {
  std::string model = "deploy/models/ling-tiny";
  int threads = 2;
  int questions = 16;
  int repeats = 5;
  std::vector<int> batches = {1, 4, 16};
  std::vector<double> temperatures = {0, 0.8};
};

std::vector<EngineRequest> Questions(const BenchModel& model, const Options& options, double temperature) {
  std::ifstream file(options.model + "/samples.json");
  std::stringstream text;
  text << file.rdbuf();
  const auto samples = ParseJson(text.str());
  MR_CHECK(samples.ok(), "{}/samples.json: {}", options.model, Message(samples.status()));
  std::vector<EngineRequest> requests;
  for (const Json& sample : *samples) {
    if (static_cast<int>(requests.size()) == options.questions) break;
    ChatRequest chat;
    chat.messages.push_back({"user", sample["question"].get<std::string>(), {}, {}, ""});
    const auto prompt = RenderChat(ChatFormatKind::kLingV2, chat);
    MR_CHECK(prompt.ok());
    EngineRequest& request = requests.emplace_back();
    request.prompt = *model.tokenizer->Encode(*prompt);
    request.sampling.temperature = static_cast<float>(temperature);
    request.sampling.seed = requests.size();
    request.sampling.max_tokens = 64;
  }
  return requests;
}

struct Pass {
  double seconds = 0;
  int64_t tokens = 0;
  std::vector<std::vector<int32_t>> answers;
};

Pass Play(Engine* engine, std::vector<EngineRequest> requests, int batch, RequestId* next_id) {
  Pass pass;
  for (size_t i = 0; i < requests.size(); i += static_cast<size_t>(batch)) {
    std::vector<EngineRequest> part;
    for (size_t j = i; j < std::min(requests.size(), i + static_cast<size_t>(batch)); ++j) {
      requests[j].id = ++*next_id;
      part.push_back(requests[j]);
    }
    const double begin = Seconds(Clock::System().Now().time_since_epoch());
    for (BenchAnswer& answer : AskAll(engine, part)) {
      pass.tokens += static_cast<int64_t>(answer.tokens.size());
      pass.answers.push_back(std::move(answer.tokens));
    }
    pass.seconds += Seconds(Clock::System().Now().time_since_epoch()) - begin;
  }
  return pass;
}

void Run(const Options& options) {
  const BenchModel model(options.model);
  fmt::print("{:>5} {:>11} {:>10} {:>11} {:>11} {:>11} {:>22} {:>6}\n", "batch", "temperature", "accepted",
             "tokens/step", "tok/s off", "tok/s auto", "auto / off (of repeats)", "equal");
  for (const double temperature : options.temperatures) {
    const auto requests = Questions(model, options, temperature);
    for (const int batch : options.batches) {
      EngineOptions engine_options;
      engine_options.prefix_cache = false;
      const auto plain = model.Start(engine_options, 512, options.threads);
      engine_options.speculate = true;
      const auto speculating = model.Start(engine_options, 512, options.threads);
      std::vector<double> off, with, ratios;
      bool equal = true;
      RequestId next_id = 0;
      for (int repeat = 0; repeat <= options.repeats; ++repeat) {
        const Pass a = Play(plain.get(), requests, batch, &next_id);
        const Pass b = Play(speculating.get(), requests, batch, &next_id);
        equal = equal && a.answers == b.answers;
        if (repeat == 0) continue;  // warms up
        off.push_back(static_cast<double>(a.tokens) / a.seconds);
        with.push_back(static_cast<double>(b.tokens) / b.seconds);
        ratios.push_back(with.back() / off.back());
      }
      const EngineStats stats = speculating->Stats();
      const double accepted = stats.drafted_tokens > 0 ? static_cast<double>(stats.accepted_tokens) /
                                                             static_cast<double>(stats.drafted_tokens)
                                                       : 0;
      fmt::print(
          "{:>5} {:>11.1f} {:>8.1f} % {:>11.2f} {:>11.0f} {:>11.0f} {:>8.2f} ({:.2f} to {:.2f}) {:>6}\n",
          batch, temperature, 100 * accepted,
          static_cast<double>(stats.output_tokens) /
              static_cast<double>(stats.output_tokens - stats.accepted_tokens),
          Percentile(off, 0.5), Percentile(with, 0.5), Percentile(ratios, 0.5), Percentile(ratios, 0),
          Percentile(ratios, 1), equal ? "yes" : "NO");
    }
  }
}

}  // namespace
}  // namespace millrace::engine

int main(int argc, char** argv) {
  millrace::engine::Options options;
  CLI::App app("Answers with and without the MTP layer's drafts");
  app.add_option("--model", options.model)->capture_default_str();
  app.add_option("--threads", options.threads)->capture_default_str();
  app.add_option("--questions", options.questions)->capture_default_str();
  app.add_option("--repeats", options.repeats)->capture_default_str();
  app.add_option("--batch", options.batches)->delimiter(',')->capture_default_str();
  app.add_option("--temperature", options.temperatures)->delimiter(',')->capture_default_str();
  CLI11_PARSE(app, argc, argv);
  millrace::engine::Run(options);
}
