#include "tests/bench/engine_on_model.h"

#include <algorithm>
#include <future>

#include "base/check.h"
#include "engine/model/checkpoint.h"

namespace millrace::engine {
namespace {

template <typename T>
T OrDie(StatusOr<T> value) {
  MR_CHECK(value.ok(), "{}", Message(value.status()));
  return *std::move(value);
}

double Now() { return Seconds(Clock::System().Now().time_since_epoch()); }

class BenchSink final : public TokenSink {
 public:
  BenchSink(BenchAnswer* answer, double begun, std::promise<void> done)
      : answer_(answer), begun_(begun), done_(std::move(done)) {}
  void OnToken(const TokenEvent& event) override {
    if (answer_->tokens.empty()) {
      answer_->first_token_seconds = Now() - begun_;
      answer_->cached_tokens = event.cached_tokens;
    }
    answer_->tokens.push_back(event.token.token);
    if (event.finish == FinishReason::kNone) return;
    answer_->seconds = Now() - begun_;
    done_.set_value();
  }
  void OnError(const Status& status) override { MR_CHECK(false, "{}", Message(status)); }

 private:
  BenchAnswer* const answer_;
  const double begun_;
  std::promise<void> done_;
};

}  // namespace

BenchModel::BenchModel(const std::string& directory) {
  config = OrDie(LoadModelConfig(directory));
  const auto checkpoint = OrDie(Checkpoint::Open(directory));
  std::vector<std::string> unused;
  const Status checked = CheckTensors(*checkpoint, &config, &unused);
  MR_CHECK(checked.ok(), "{}", Message(checked));
  tokenizer = OrDie(Tokenizer::Load(directory));
  weights = OrDie(LoadCpuWeights(*checkpoint, config, {}));
}

size_t BenchModel::page_bytes(bool with_mtp) const {
  KvLayout layout;
  layout.num_layers = config.num_layers + (with_mtp ? config.num_mtp_layers : 0);
  layout.num_kv_heads = config.num_kv_heads;
  layout.head_dim = config.head_dim;
  return layout.page_bytes();
}

std::unique_ptr<Engine> BenchModel::Start(EngineOptions options, int32_t num_pages, int threads) const {
  CpuBackendOptions backend;
  backend.num_threads = threads;
  backend.num_pages = num_pages;
  backend.batch_tokens_max = options.batch_tokens_max;
  backend.logit_rows_max = options.running_max;
  backend.with_mtp = options.speculate;
  options.num_vocabulary_tokens = tokenizer->size();
  return OrDie(Engine::Create(options, OrDie(MakeCpuBackend(weights, backend)), nullptr));
}

std::vector<BenchAnswer> AskAll(Engine* engine, const std::vector<EngineRequest>& requests) {
  std::vector<BenchAnswer> answers(requests.size());
  std::vector<std::future<void>> done;
  for (size_t i = 0; i < requests.size(); ++i) {
    std::promise<void> promise;
    done.push_back(promise.get_future());
    const Status status =
        engine->Generate(requests[i], std::make_unique<BenchSink>(&answers[i], Now(), std::move(promise)));
    MR_CHECK(status.ok(), "{}", Message(status));
  }
  for (std::future<void>& each : done) each.wait();
  return answers;
}

double Percentile(std::vector<double> values, double share) {
  MR_CHECK(!values.empty());
  std::sort(values.begin(), values.end());
  return values[static_cast<size_t>(share * static_cast<double>(values.size() - 1) + 0.5)];
}

}  // namespace millrace::engine
