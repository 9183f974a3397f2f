// A constraint after thinking under speculation and across hand-overs: drafts that are rejected take back
// what the grammar had followed, through the end of the thoughts and through counted strings.
#include <gtest/gtest.h>

#include <algorithm>
#include <filesystem>
#include <string>

#include "base/file.h"
#include "base/json.h"
#include "engine/grammar/grammar_mask.h"
#include "engine/tokenizer/byte_alphabet.h"
#include "tests/engine/test_engine.h"

namespace millrace::engine {
namespace {

// The fake model's 90 tokens: JSON's bytes and some longer pieces, among them the end of the thoughts. The
// other bytes have ids that the model does not know.
class FakeTokenizer {
 public:
  FakeTokenizer() : directory_(::testing::TempDir() + "fake_tokenizer") {
    std::filesystem::create_directories(directory_);
    EXPECT_TRUE(WriteFileAtomically(directory_ + "/tokenizer.json", DumpJson(File())).ok());
    auto loaded = Tokenizer::Load(directory_);
    EXPECT_TRUE(loaded.ok()) << loaded.status();
    if (loaded.ok()) tokenizer_ = *std::move(loaded);
  }
  ~FakeTokenizer() { std::filesystem::remove_all(directory_); }
  const Tokenizer& operator*() const { return *tokenizer_; }
  int32_t id_of_thoughts_end() const { return thoughts_end_; }

 private:
  Json File() {
    Json vocab = Json::object();
    int32_t next = 0;
    const auto add = [&](const std::string& token) {
      if (vocab.contains(token)) return;
      if (next == kFakeEos) ++next;
      vocab[token] = next++;
    };
    for (const char byte : std::string_view("{}[]\":, \n0123456789abcdefghijklmnopqrstuvwxyz<>/\\-ABCDEF"))
      add(ByteSymbol(static_cast<uint8_t>(byte)));
    for (const char* piece : {"</", "think", "think>", "\"a", "\"b\":", "ab", "abc", "abcde", "12", "123",
                              "\"}", "],", "\"w", "xy", "xyz", "\":["})
      add(piece);
    thoughts_end_ = next;
    add("</think>");
    EXPECT_LE(next, kFakeVocabularyTokens);
    next = kFakeVocabularyTokens;  // what the model can draw ends here
    for (int byte = 0; byte < 256; ++byte) add(ByteSymbol(static_cast<uint8_t>(byte)));
    Json file = *ParseJson(R"json({"version": "1.0", "truncation": null, "padding": null, "normalizer": null,
      "added_tokens": [{"id": 3, "content": "<|role_end|>", "single_word": false, "lstrip": false, "rstrip": false,
                        "normalized": false, "special": true}],
      "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
        {"type": "Split", "pattern": {"Regex": "'(?i:[sdmt]|ll|ve|re)|[^\\r\\n\\p{L}\\p{N}]?+\\p{L}+|\\p{N}| ?[^\\s\\p{L}\\p{N}]++[\\r\\n]*|\\s*[\\r\\n]|\\s+(?!\\S)|\\s+"},
         "behavior": "Isolated", "invert": false},
        {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false}]},
      "post_processor": null,
      "decoder": {"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true},
      "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
                "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "ignore_merges": false,
                "merges": []}})json");
    file["model"]["vocab"] = std::move(vocab);
    return file;
  }

  const std::string directory_;
  std::unique_ptr<Tokenizer> tokenizer_;
  int32_t thoughts_end_ = 0;
};

constexpr const char* kThinking =
    R"({"thinking":true,"type":"json_schema","schema":{"type":"object","properties":{
        "b":{"type":"array","items":{"type":"integer","minimum":0,"maximum":999},"minItems":6,"maxItems":9},
        "word":{"type":"string","minLength":30,"maxLength":45}},"required":["b","word"]}})";

EngineOptions Speculating() {
  EngineOptions options = Options();
  options.speculate = true;
  return options;
}

TEST(ConstraintSpeculation, HoldsThroughThoughtsAndHandOvers) {
  const FakeTokenizer tokenizer;
  GrammarCache cache(*tokenizer);
  const auto constrained = [&](RequestId id, float temperature, std::span<const int32_t> output) {
    EngineRequest request = Request(id, 65, 400);
    request.output.assign(output.begin(), output.end());
    request.sampling.temperature = temperature;
    request.sampling.ignore_eos = false;
    request.sampling.logit_bias = {{tokenizer.id_of_thoughts_end(), 1.0f}};
    auto mask = cache.MaskFor(kThinking);  // every worker's own
    EXPECT_TRUE(mask.ok()) << mask.status();
    request.sampling.mask = *mask;
    return request;
  };
  int ended = 0;
  size_t thoughts = 0;
  uint64_t accepted = 0, drafted = 0;  // by all: whether one answer is drafted for is a matter of time
  for (const float temperature : {0.0f, 1.0f, 2.0f}) {
    for (RequestId id = 1; id <= 6; ++id) {
      TestEngine engine(40, Speculating());
      const auto answer = engine.Generate(constrained(id, temperature, {}));
      ASSERT_EQ(answer->AwaitEnd(), OkStatus());
      const std::vector<int32_t> tokens = answer->tokens();
      // Sampling alone, without drafts, is the reference.
      EXPECT_EQ(tokens, ExpectedAnswer(constrained(id, temperature, {})).tokens) << id;
      const EngineStats stats = engine.Settled();
      accepted += stats.accepted_tokens;
      drafted += stats.drafted_tokens;
      engine.ExpectAllFree();
      if (answer->finish() == FinishReason::kStop) {
        ++ended;
        const std::string text = (*tokenizer).Decode(tokens, true);
        const size_t end = text.find("</think>");
        ASSERT_NE(end, std::string::npos) << text;
        thoughts += end;
        const auto json = ParseJson(text.substr(end + 8));
        ASSERT_TRUE(json.ok()) << text;
        EXPECT_GE((*json)["b"].size(), 6u) << text;
        EXPECT_GE((*json)["word"].get<std::string>().size(), 30u) << text;
      }
      // Another worker goes on from anywhere: in the thoughts, at their end, in the answer.
      for (const size_t sent : {size_t{1}, tokens.size() / 3, tokens.size() / 2, tokens.size() - 1}) {
        TestEngine other(40, Speculating());
        const auto rest = other.Generate(constrained(id, temperature, std::span(tokens).first(sent)));
        ASSERT_EQ(rest->AwaitEnd(), OkStatus());
        const auto expected = std::span(tokens).subspan(sent);
        EXPECT_EQ(rest->tokens(), std::vector(expected.begin(), expected.end())) << id << " after " << sent;
      }
    }
  }
  EXPECT_GT(ended, 9) << "of 18";
  EXPECT_GT(thoughts, 0u);
  EXPECT_GT(accepted, 0u);
  EXPECT_GT(drafted, accepted) << "some are rejected";
}

}  // namespace
}  // namespace millrace::engine
