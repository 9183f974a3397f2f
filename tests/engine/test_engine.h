#pragma once
// An engine on the fake backend, and requests for it.

#include <gtest/gtest.h>

#include <future>
#include <memory>
#include <utility>
#include <vector>

#include "tests/engine/fake_backend.h"
#include "tests/engine/recording_sink.h"

namespace millrace::engine {

inline std::vector<int32_t> RandomTokens(int32_t count, uint64_t seed) {
  Random random(seed << 32);
  std::vector<int32_t> tokens(static_cast<size_t>(count));
  for (int32_t& token : tokens) token = static_cast<int32_t>(random.Below(kFakeVocabularyTokens));
  return tokens;
}

inline EngineRequest Request(RequestId id, int32_t prompt_tokens, int32_t max_tokens) {
  EngineRequest request;
  request.id = id;
  request.prompt = RandomTokens(prompt_tokens, id);
  request.sampling.seed = id * 7;
  request.sampling.max_tokens = max_tokens;
  request.sampling.ignore_eos = true;
  return request;
}

inline EngineOptions Options() {
  EngineOptions options;
  options.batch_tokens_max = 256;
  options.running_max = 16;
  options.waiting_max = 64;
  options.num_vocabulary_tokens = kFakeVocabularyTokens;
  return options;
}

// An engine on a fake backend.
struct TestEngine {
  explicit TestEngine(int32_t num_pages, EngineOptions options = Options(), Metrics* metrics = nullptr) {
    auto owned = std::make_unique<FakeBackend>(num_pages);
    backend = owned.get();
    auto created = Engine::Create(options, std::move(owned), metrics);
    MR_CHECK(created.ok(), "{}", Message(created.status()));
    engine = *std::move(created);
  }
  ~TestEngine() { backend->Open(); }

  std::shared_ptr<Recording> Generate(const EngineRequest& request) {
    auto recording = std::make_shared<Recording>(static_cast<int32_t>(request.output.size()));
    EXPECT_EQ(engine->Generate(request, std::make_unique<RecordingSink>(recording)), OkStatus());
    return recording;
  }
  std::shared_ptr<Recording> Prefill(const EngineRequest& request) {
    auto recording =
        std::make_shared<Recording>(static_cast<int32_t>(request.output.size()), /*is_prefill=*/true);
    EXPECT_EQ(engine->Prefill(request, std::make_unique<RecordingSink>(recording)), OkStatus());
    return recording;
  }
  std::shared_ptr<Recording> BeginImport(const EngineRequest& request) {
    auto recording = std::make_shared<Recording>(static_cast<int32_t>(request.output.size()));
    EXPECT_EQ(engine->BeginImport(request, std::make_unique<RecordingSink>(recording)), OkStatus());
    return recording;
  }
  // The answer is moved on, never copied: a Status that two threads share ends in abseil's own library, where
  // ThreadSanitizer sees nothing.
  std::future<StatusOr<GrantedPages>> GrantLater(RequestId id, int32_t num_pages) {
    std::promise<StatusOr<GrantedPages>> promise;
    auto future = promise.get_future();
    engine->Grant(id, num_pages, [promise = std::move(promise)](auto pages) mutable {
      promise.set_value(std::move(pages));
    });
    return future;
  }
  StatusOr<std::vector<PageId>> Grant(RequestId id, int32_t num_pages) {
    auto granted = GrantLater(id, num_pages).get();
    if (!granted.ok()) return granted.status();
    return granted->pages;
  }

  // Stats once all commands so far have been executed: a grant for nobody is answered by the engine thread in
  // order, and the second one only after the turn of the first one was published.
  EngineStats Settled() {
    for (int i = 0; i < 2; ++i) EXPECT_FALSE(Grant(~uint64_t{0}, 1).ok());
    return engine->Stats();
  }
  void ExpectAllFree() {
    const EngineStats stats = Settled();
    EXPECT_EQ(stats.pages_free, stats.pages_total);
    EXPECT_EQ(stats.tickets, 0);
    EXPECT_EQ(stats.waiting + stats.running + stats.importing, 0);
  }

  FakeBackend* backend = nullptr;
  std::unique_ptr<Engine> engine;
};

inline void ExpectAnswer(const EngineRequest& request, Recording& recording) {
  EXPECT_EQ(recording.AwaitEnd(), OkStatus()) << "request " << request.id;
  const FakeAnswer expected = ExpectedAnswer(request);
  EXPECT_EQ(recording.tokens(), expected.tokens) << "request " << request.id;
  EXPECT_EQ(recording.finish(), expected.finish) << "request " << request.id;
}

}  // namespace millrace::engine
