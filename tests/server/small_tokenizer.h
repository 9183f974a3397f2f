#pragma once
// A byte-level tokenizer that is small enough to count tokens by hand: one token per byte, "hello" in one
// more, and one special token.

#include <gtest/gtest.h>

#include <filesystem>
#include <memory>
#include <string>

#include "base/file.h"
#include "base/json.h"
#include "engine/tokenizer/tokenizer.h"

namespace millrace::server {

inline constexpr int32_t kHelloToken = 260;
inline constexpr int32_t kEndToken = 261;  // "<|role_end|>", special
inline constexpr int32_t kSmallVocabulary = 262;

class SmallTokenizer {
 public:
  SmallTokenizer() : directory_(::testing::TempDir() + "small_tokenizer_" + UniqueName()) {
    std::filesystem::create_directories(directory_);
    EXPECT_TRUE(WriteFileAtomically(directory_ + "/tokenizer.json", DumpJson(File())).ok());
    auto loaded = engine::Tokenizer::Load(directory_);
    EXPECT_TRUE(loaded.ok()) << loaded.status();
    if (loaded.ok()) tokenizer_ = *std::move(loaded);
  }
  ~SmallTokenizer() { std::filesystem::remove_all(directory_); }

  const engine::Tokenizer& operator*() const { return *tokenizer_; }

  // The token that stands for one byte.
  int32_t Byte(unsigned char byte) const {
    for (int32_t id = 0; id < 256; ++id) {
      const std::string_view bytes = tokenizer_->Bytes(id);
      if (bytes.size() == 1 && static_cast<unsigned char>(bytes[0]) == byte) return id;
    }
    ADD_FAILURE() << "no token for byte " << static_cast<int>(byte);
    return -1;
  }

 private:
  static std::string UniqueName() {
    const auto* info = ::testing::UnitTest::GetInstance()->current_test_info();
    return std::string(info->test_suite_name()) + "_" + info->name();
  }
  // The usual alphabet of byte-level BPE: printable bytes stand for themselves, the others for U+0100 and on.
  static std::string Symbol(int code_point) {
    std::string out;
    if (code_point >= 0x80) out.push_back(static_cast<char>(0xC0 | (code_point >> 6)));
    out.push_back(static_cast<char>(code_point >= 0x80 ? 0x80 | (code_point & 0x3F) : code_point));
    return out;
  }
  static Json File() {
    Json vocab = Json::object();
    int32_t next = 0;
    const auto printable = [](int byte) { return (byte > 32 && byte < 127) || (byte > 160 && byte != 173); };
    for (int byte = 0; byte < 256; ++byte) {
      if (printable(byte)) vocab[Symbol(byte)] = next++;
    }
    for (int displaced = 0; next < 256; ++displaced) vocab[Symbol(0x100 + displaced)] = next++;
    for (const char* merged : {"he", "ll", "hell", "lo", "hello"}) vocab[merged] = next++;
    Json file = *ParseJson(R"json({"version": "1.0", "truncation": null, "padding": null,
      "added_tokens": [{"id": 261, "content": "<|role_end|>", "single_word": false, "lstrip": false, "rstrip": false,
                        "normalized": false, "special": true}],
      "normalizer": null,
      "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
        {"type": "Split", "pattern": {"Regex": "'(?i:[sdmt]|ll|ve|re)|[^\\r\\n\\p{L}\\p{N}]?+\\p{L}+|\\p{N}| ?[^\\s\\p{L}\\p{N}]++[\\r\\n]*|\\s*[\\r\\n]|\\s+(?!\\S)|\\s+"},
         "behavior": "Isolated", "invert": false},
        {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false}]},
      "post_processor": null,
      "decoder": {"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true},
      "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
                "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "ignore_merges": false,
                "merges": [["h", "e"], ["l", "l"], ["he", "ll"], ["hell", "o"]]}})json");
    file["model"]["vocab"] = std::move(vocab);
    return file;
  }

  const std::string directory_;
  std::unique_ptr<engine::Tokenizer> tokenizer_;
};

}  // namespace millrace::server
