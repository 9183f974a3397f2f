// Workers over the real engine, with a backend whose logits are a function of the KV bytes in the sequence's
// pages.
#include <gtest/gtest.h>

#include <cstring>

#include "base/digest.h"
#include "base/random.h"
#include "engine/core/engine.h"
#include "server/worker/worker.h"
#include "tests/server/client.h"
#include "tests/server/fake_transfer.h"

namespace millrace::server {
namespace {

constexpr int32_t kVocabulary = 200;

class HashBackend final : public engine::Backend {
 public:
  explicit HashBackend(int32_t num_pages) {
    layout_ = {.num_layers = 3,
               .num_pages = num_pages,
               .num_kv_heads = 1,
               .head_dim = 8,
               .dtype = engine::KvDType::kF32};
    memory_.resize(layout_.total_bytes());
    config_.num_layers = 3;
    config_.vocab_size = kVocabulary;
    config_.max_position = 4096;
    config_.eos_token_ids = {1};
  }
  const engine::ModelConfig& config() const override { return config_; }
  const engine::KvLayout& kv_layout() const override { return layout_; }
  std::span<std::byte> kv_memory() override { return memory_; }
  std::string Describe() const override { return "hash"; }

  StatusOr<engine::StepOutput> Forward(const engine::Batch& batch,
                                       const engine::LayerDone& layer_done) override {
    for (int32_t layer = 0; layer < layout_.num_layers; ++layer) {
      for (const engine::Segment& segment : batch.segments) {
        for (size_t i = 0; i < segment.tokens.size(); ++i) {
          const uint64_t word =
              Mix64(static_cast<uint64_t>(segment.tokens[i]) * 31 + static_cast<uint64_t>(layer));
          std::memcpy(Row(segment, layer, segment.position + static_cast<int32_t>(i)), &word, sizeof(word));
        }
      }
      layer_done(layer);
    }
    logits_.clear();
    for (const engine::Segment& segment : batch.segments) {
      const auto tokens = static_cast<int32_t>(segment.tokens.size());
      for (int32_t i = tokens - segment.num_logits; i < tokens; ++i)
        AppendLogits(segment, segment.position + i);
    }
    engine::StepOutput output;
    output.logits = logits_;
    return output;
  }

 private:
  std::byte* Row(const engine::Segment& segment, int32_t layer, int32_t position) {
    const engine::PageId page = segment.pages[static_cast<size_t>(position / engine::kPageTokens)];
    return memory_.data() + layout_.piece_offset(layer, page) +
           layout_.row_offset(0, 0, position % engine::kPageTokens);
  }
  void AppendLogits(const engine::Segment& segment, int32_t position) {
    uint64_t state = 0;
    for (int32_t layer = 0; layer < layout_.num_layers; ++layer) {
      for (int32_t p = 0; p <= position; ++p) state = Xxh3(std::span(Row(segment, layer, p), 8), state);
    }
    for (int32_t t = 0; t < kVocabulary; ++t) {
      logits_.push_back(static_cast<float>(UniformAt(state, static_cast<uint64_t>(t)) * 4));
    }
  }

  engine::KvLayout layout_;
  engine::ModelConfig config_;
  std::vector<std::byte> memory_;
  std::vector<float> logits_;
};

struct Node {
  explicit Node(WorkerRole role, int32_t num_pages = 64) {
    engine::EngineOptions engine_options;
    engine_options.batch_tokens_max = 128;
    engine_options.num_vocabulary_tokens = kVocabulary;
    engine = *engine::Engine::Create(engine_options, std::make_unique<HashBackend>(num_pages), nullptr);
    WorkerOptions options;
    options.role = role;
    options.model_digest = "digest";
    options.grant_pages = 2;
    worker = *Worker::Start(options, engine.get(), &transfer);
  }
  bool AllFree() {
    const engine::EngineStats stats = engine->Stats();
    return stats.pages_free == stats.pages_total && stats.tickets == 0 &&
           transfer.TakeSnapshot().open_tickets == 0;
  }
  std::unique_ptr<engine::Engine> engine;
  FakeTransfer transfer;
  std::unique_ptr<Worker> worker;
};

rpc::GenerateRequest Prompt(int32_t tokens, uint64_t seed, const std::vector<std::string>& prefill) {
  rpc::GenerateRequest request = Request(0, prefill, 40);
  for (int32_t i = 0; i < tokens; ++i) request.add_prompt((i * 7 + tokens) % kVocabulary);
  request.mutable_sampling()->set_seed(seed);
  request.mutable_sampling()->set_repetition_penalty(1.2f);
  return request;
}

TEST(Split, AnswersEqualThoseOfOneEngine) {
  Node alone(WorkerRole::kBoth), decode(WorkerRole::kDecode), prefill(WorkerRole::kPrefill);
  std::vector<Running> split;
  std::vector<Running> whole;
  for (const int32_t length : {1, 63, 64, 65, 300, 511, 700}) {
    const auto seed = static_cast<uint64_t>(length);
    split.push_back(Ask(decode.worker->address(), Prompt(length, seed, {prefill.worker->address()})));
    whole.push_back(Ask(alone.worker->address(), Prompt(length, seed, {})));
  }
  for (size_t i = 0; i < split.size(); ++i) {
    SCOPED_TRACE(i);
    const grpc::Status status = split[i].answer->Wait();
    EXPECT_TRUE(status.ok()) << status.error_message();
    EXPECT_TRUE(whole[i].answer->Wait().ok());
    EXPECT_FALSE(split[i].answer->tokens().empty());
    EXPECT_EQ(split[i].answer->tokens(), whole[i].answer->tokens());
  }
  for (Node* node : {&alone, &decode, &prefill}) EXPECT_TRUE(Eventually([&] { return node->AllFree(); }));
}

// The second time, P computes only the end of the prompt and D takes only the pages that it lacks.
TEST(Split, SecondTurnsComputeAndMoveWhatIsNew) {
  Node alone(WorkerRole::kBoth), decode(WorkerRole::kDecode), prefill(WorkerRole::kPrefill);
  rpc::GenerateRequest request = Prompt(300, 1, {prefill.worker->address()});
  const auto ask = [&](int32_t cached_tokens) {
    const Running split = Ask(decode.worker->address(), request);
    EXPECT_TRUE(split.answer->Wait().ok());
    rpc::GenerateRequest whole = request;
    whole.clear_prefill();
    whole.set_cache_salt("of its own " + std::to_string(cached_tokens));
    const Running expected = Ask(alone.worker->address(), whole);
    EXPECT_TRUE(expected.answer->Wait().ok());
    EXPECT_EQ(split.answer->tokens(), expected.answer->tokens());
    EXPECT_EQ(split.answer->cached_tokens(), cached_tokens);
    EXPECT_EQ(expected.answer->cached_tokens(), 0);
    return split.answer->tokens();
  };
  const std::vector<int32_t> answer = ask(0);
  for (const int32_t token : answer) request.add_prompt(token);
  for (int32_t i = 0; i < 100; ++i) request.add_prompt(i);
  // D has the KV of all but the last token of its answer, P that of the prompt.
  ask(static_cast<int32_t>(300 + answer.size() - 1) / 64 * 64);
  // A P that knows nothing still sends only what D lacks.
  Node other(WorkerRole::kPrefill);
  request.set_prefill(0, other.worker->address());
  ask(static_cast<int32_t>(request.prompt_size() - 1) / 64 * 64);
  for (Node* node : {&alone, &decode, &prefill, &other}) {
    EXPECT_TRUE(Eventually([&] { return node->AllFree(); }));
  }
}

TEST(Split, MoreThanFitsWaitsItsTurn) {
  Node alone(WorkerRole::kBoth), decode(WorkerRole::kDecode, 16), prefill(WorkerRole::kPrefill, 16);
  std::vector<Running> split;
  for (uint64_t i = 0; i < 8; ++i) {
    split.push_back(Ask(decode.worker->address(), Prompt(500, i, {prefill.worker->address()})));
  }
  for (uint64_t i = 0; i < 8; ++i) {
    const Running whole = Ask(alone.worker->address(), Prompt(500, i, {}));
    EXPECT_TRUE(whole.answer->Wait().ok());
    EXPECT_TRUE(split[i].answer->Wait().ok());
    EXPECT_EQ(split[i].answer->tokens(), whole.answer->tokens());
  }
  for (Node* node : {&decode, &prefill}) EXPECT_TRUE(Eventually([&] { return node->AllFree(); }));
}

TEST(Split, CancelStormsLeaveNothingBehind) {
  Node decode(WorkerRole::kDecode, 24), prefill(WorkerRole::kPrefill, 24);
  Random random(5);
  std::vector<Running> running;
  for (int i = 0; i < 60; ++i) {
    running.push_back(Ask(decode.worker->address(), Prompt(1 + static_cast<int32_t>(random.Below(700)),
                                                           random.Next(), {prefill.worker->address()})));
    std::this_thread::sleep_for(std::chrono::microseconds(random.Below(8000)));
    running[random.Below(running.size())].call->Cancel();
  }
  for (const Running& one : running) {
    one.call->Cancel();
    one.answer->Wait();
  }
  for (Node* node : {&decode, &prefill}) EXPECT_TRUE(Eventually([&] { return node->AllFree(); }));
}

}  // namespace
}  // namespace millrace::server
