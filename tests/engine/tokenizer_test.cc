#include "engine/tokenizer/tokenizer.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <filesystem>
#include <functional>
#include <string>
#include <vector>

#include "base/file.h"
#include "base/json.h"
#include "engine/tokenizer/normalizer.h"
#include "engine/tokenizer/pretokenizer.h"

// Expected ids and pieces in this file come from the Hugging Face tokenizers package on the same
// tokenizer.json.

namespace millrace::engine {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;

constexpr const char* kFileWithoutVocab =
    R"json({"version": "1.0", "truncation": null, "padding": null, "added_tokens": [
{"id": 272, "content": "<|endoftext|>", "single_word": false, "lstrip": false, "rstrip": false, "normalized": false, "special": true}, 
{"id": 273, "content": "<role>", "single_word": false, "lstrip": false, "rstrip": false, "normalized": false, "special": true}, 
{"id": 274, "content": "</role>", "single_word": false, "lstrip": false, "rstrip": false, "normalized": false, "special": true}, 
{"id": 275, "content": "<role>X", "single_word": false, "lstrip": false, "rstrip": false, "normalized": false, "special": true}, 
{"id": 276, "content": "<note>", "single_word": false, "lstrip": false, "rstrip": false, "normalized": false, "special": false}, 
{"id": 280, "content": "<tail>", "single_word": false, "lstrip": false, "rstrip": false, "normalized": false, "special": true}],
"normalizer": null,
"pre_tokenizer": {"type": "Sequence", "pretokenizers": [{"type": "Split", "pattern": {"Regex": "'(?i:[sdmt]|ll|ve|re)|[^\\r\\n\\p{L}\\p{N}]?+\\p{L}+|\\p{N}| ?[^\\s\\p{L}\\p{N}]++[\\r\\n]*|\\s*[\\r\\n]|\\s+(?!\\S)|\\s+"}, 
"behavior": "Isolated", "invert": false}, 
{"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false}]}, "post_processor": null, "decoder": 
{"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true},
"model": {"type": "BPE", "dropout": null, 
"unk_token": null, "continuing_subword_prefix": null, "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "ignore_merges": false, 
"merges": [["h", "e"], ["l", "l"], ["he", "ll"], ["hell", "o"], ["\u0120", "w"], ["o", "r"], ["\u0120w", "or"], 
["\u010a", "\u010a"], ["\u0120", "\u0120"], ["'", "s"], ["\u00e4", "\u00b8"], ["\u00e4\u00b8", "\u0143"], ["a", "b"], ["b", "c"], ["ab", "c"]]}})json";

// Ids 256 and on; 0 to 255 are the byte symbols: those that stand for themselves, then the others, in byte
// order.
constexpr const char* kMergedTokens[] = {"he",
                                         "ll",
                                         "hell",
                                         "hello",
                                         "\304\240w",
                                         "or",
                                         "\304\240wor",
                                         "\304\212\304\212",
                                         "\304\240\304\240",
                                         "'s",
                                         "\303\244\302\270",
                                         "\303\244\302\270\305\203",
                                         "ab",
                                         "bc",
                                         "abc",
                                         "world"};

bool StandsForItself(int byte) { return (byte > 32 && byte < 127) || (byte > 160 && byte != 173); }

void AppendCodePoint(int c, std::string& out) {
  if (c >= 0x80) out.push_back(static_cast<char>(0xC0 | (c >> 6)));
  out.push_back(static_cast<char>(c >= 0x80 ? 0x80 | (c & 0x3F) : c));
}

Json SmallTokenizer() {
  Json file = *ParseJson(kFileWithoutVocab);
  Json& vocab = file["model"]["vocab"];
  vocab = Json::object();
  int num_ids = 0;
  for (int byte = 0; byte < 256; ++byte) {
    std::string symbol;
    AppendCodePoint(byte, symbol);
    if (StandsForItself(byte)) vocab[symbol] = num_ids++;
  }
  for (int displaced = 0; num_ids < 256; ++displaced) {
    std::string symbol;
    AppendCodePoint(0x100 + displaced, symbol);
    vocab[symbol] = num_ids++;
  }
  for (const char* token : kMergedTokens) vocab[token] = num_ids++;
  return file;
}

class TokenizerTest : public ::testing::Test {
 protected:
  TokenizerTest() : directory_(::testing::TempDir() + "tokenizer_test_" + TestName()) {
    std::filesystem::create_directories(directory_);
  }
  ~TokenizerTest() override { std::filesystem::remove_all(directory_); }

  StatusOr<std::unique_ptr<Tokenizer>> Load(const std::string& text) {
    EXPECT_TRUE(WriteFileAtomically(directory_ + "/tokenizer.json", text).ok());
    return Tokenizer::Load(directory_);
  }
  std::unique_ptr<Tokenizer> MustLoad(const Json& file) {
    auto tokenizer = Load(DumpJson(file));
    EXPECT_TRUE(tokenizer.ok()) << tokenizer.status();
    return tokenizer.ok() ? *std::move(tokenizer) : nullptr;
  }
  static std::string TestName() { return ::testing::UnitTest::GetInstance()->current_test_info()->name(); }

  std::string directory_;
};

struct EncodeCase {
  std::string text;
  std::vector<TokenId> ids;
};

TEST_F(TokenizerTest, EncodesAsTheReference) {
  const EncodeCase cases[] = {
      {"", {}},
      {"hello world", {259, 262, 75, 67}},
      {"hello  world's\n\n\nabcabc", {259, 220, 262, 75, 67, 265, 263, 198, 270, 270}},
      {"<role>HUMAN</role>hello<role>X<|endoftext|>", {273, 39, 52, 44, 32, 45, 274, 259, 275, 272}},
      {"<role><role", {273, 27, 81, 78, 75, 68}},
      {"a<note>b", {64, 276, 65}},
      {"\344\270\255\346\226\207", {267, 162, 244, 229}},
      {"I'LL 42", {40, 6, 43, 43, 220, 19, 17}},
      {"e\314\201", {68, 136, 223}},
      {"   \n  x  ", {264, 220, 198, 220, 220, 87, 264}},
  };
  const auto tokenizer = MustLoad(SmallTokenizer());
  ASSERT_NE(tokenizer, nullptr);
  for (const EncodeCase& c : cases) {
    const auto ids = tokenizer->Encode(c.text);
    ASSERT_TRUE(ids.ok()) << c.text;
    EXPECT_EQ(*ids, c.ids) << c.text;
    EXPECT_EQ(tokenizer->Decode(*ids, /*skip_special=*/false), c.text);
  }
}

TEST_F(TokenizerTest, ReadsMergesWrittenAsOneString) {
  Json file = SmallTokenizer();
  for (Json& merge : file["model"]["merges"]) {
    merge = merge[0].get<std::string>() + " " + merge[1].get<std::string>();
  }
  const auto tokenizer = MustLoad(file);
  ASSERT_NE(tokenizer, nullptr);
  EXPECT_THAT(*tokenizer->Encode("hello abcabc"), ElementsAre(259, 220, 270, 270));
}

TEST_F(TokenizerTest, IgnoreMergesTakesWholePiecesFromTheVocabulary) {
  Json file = SmallTokenizer();
  auto tokenizer = MustLoad(file);
  ASSERT_NE(tokenizer, nullptr);
  EXPECT_THAT(*tokenizer->Encode("world worldx"), ElementsAre(86, 261, 75, 67, 262, 75, 67, 87));
  file["model"]["ignore_merges"] = true;
  tokenizer = MustLoad(file);
  ASSERT_NE(tokenizer, nullptr);
  EXPECT_THAT(*tokenizer->Encode("world worldx"), ElementsAre(271, 262, 75, 67, 87));
}

TEST_F(TokenizerTest, NormalizesToFormCWhenTheFileSaysSo) {
  Json file = SmallTokenizer();
  file["normalizer"]["type"] = "NFC";
  const auto tokenizer = MustLoad(file);
  ASSERT_NE(tokenizer, nullptr);
  EXPECT_THAT(*tokenizer->Encode("e\314\201"), ElementsAre(127, 102));
}

TEST_F(TokenizerTest, FindsNormalizedAddedTokensAfterTheOthers) {
  Json file = SmallTokenizer();
  file["normalizer"]["type"] = "NFC";
  file["added_tokens"][4]["normalized"] = true;
  file["added_tokens"][4]["content"] = "e\314\201<r";
  const auto tokenizer = MustLoad(file);
  ASSERT_NE(tokenizer, nullptr);
  EXPECT_THAT(*tokenizer->Encode("\303\251<r"), ElementsAre(276));
  // <role> is cut out first, although the normalised token begins further left.
  EXPECT_THAT(*tokenizer->Encode("e\314\201<role>"), ElementsAre(127, 102, 273));
}

TEST_F(TokenizerTest, LeavesAddedTokensAsTextWhenAskedTo) {
  const auto tokenizer = MustLoad(SmallTokenizer());
  ASSERT_NE(tokenizer, nullptr);
  const auto ids = tokenizer->Encode("<role>", /*parse_special=*/false);
  EXPECT_THAT(*ids, ElementsAre(27, 81, 78, 75, 68, 29));
}

TEST_F(TokenizerTest, RefusesTextThatIsNotUtf8) {
  const auto tokenizer = MustLoad(SmallTokenizer());
  ASSERT_NE(tokenizer, nullptr);
  for (const char* bad : {"ab\xFF", "ab\xC0\x80", "ab\xE4\xB8", "ab\xED\xA0\x80", "ab\xF4\x90\x80\x80",
                          "ab\x80", "ab\xE0\x9F\xBF"}) {
    const auto ids = tokenizer->Encode(bad);
    EXPECT_TRUE(absl::IsInvalidArgument(ids.status()));
    EXPECT_THAT(std::string(Message(ids.status())), HasSubstr("byte 2"));
  }
}

TEST_F(TokenizerTest, DescribesItsTokens) {
  const auto tokenizer = MustLoad(SmallTokenizer());
  ASSERT_NE(tokenizer, nullptr);
  EXPECT_EQ(tokenizer->size(), 281);
  EXPECT_EQ(tokenizer->Bytes(220), " ");
  EXPECT_EQ(tokenizer->Bytes(266), "\xE4\xB8");
  EXPECT_EQ(tokenizer->Bytes(273), "<role>");
  EXPECT_TRUE(tokenizer->IsSpecial(273));
  EXPECT_FALSE(tokenizer->IsSpecial(276));  // added, but not special
  EXPECT_FALSE(tokenizer->IsSpecial(259));
  EXPECT_TRUE(tokenizer->HasToken(280));
  for (const TokenId id : {277, 281, -1}) {
    EXPECT_FALSE(tokenizer->HasToken(id)) << id;
    EXPECT_FALSE(tokenizer->IsSpecial(id)) << id;
    EXPECT_EQ(tokenizer->Bytes(id), "") << id;
  }
  EXPECT_EQ(tokenizer->Find("<role>"), 273);
  EXPECT_EQ(tokenizer->Find("hello"), std::nullopt);
  const std::vector<TokenId> ids = {273, 259, 276, 277, 272};
  EXPECT_EQ(tokenizer->Decode(ids, /*skip_special=*/true), "hello<note>");
  EXPECT_EQ(tokenizer->Decode(ids, /*skip_special=*/false), "<role>hello<note><|endoftext|>");
}

TEST_F(TokenizerTest, EncodesEveryByteOfLongWordsInLinearithmicTime) {
  const auto tokenizer = MustLoad(SmallTokenizer());
  ASSERT_NE(tokenizer, nullptr);
  std::string word;
  for (int i = 0; i < 200'000; ++i) word.append("abc");
  EXPECT_EQ(*tokenizer->Encode(word), std::vector<TokenId>(200'000, 270));
}

struct RefusalCase {
  std::string named;  // in the error
  std::function<void(Json&)> change;
};

TEST_F(TokenizerTest, RefusesByNameWhatItDoesNotImplement) {
  const RefusalCase cases[] = {
      {"model.type: WordPiece", [](Json& f) { f["model"]["type"] = "WordPiece"; }},
      {"model.dropout", [](Json& f) { f["model"]["dropout"] = 0.1; }},
      {"model.end_of_word_suffix", [](Json& f) { f["model"]["end_of_word_suffix"] = "</w>"; }},
      {"normalizer: NFKC", [](Json& f) { f["normalizer"]["type"] = "NFKC"; }},
      {"pre_tokenizer", [](Json& f) { f["pre_tokenizer"] = nullptr; }},
      {"pretokenizers[0].pattern",
       [](Json& f) { f["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = "\\s+"; }},
      {"pretokenizers[0].behavior",
       [](Json& f) { f["pre_tokenizer"]["pretokenizers"][0]["behavior"] = "Removed"; }},
      {"pretokenizers[0].invert", [](Json& f) { f["pre_tokenizer"]["pretokenizers"][0]["invert"] = true; }},
      {"pretokenizers[1].add_prefix_space",
       [](Json& f) { f["pre_tokenizer"]["pretokenizers"][1]["add_prefix_space"] = true; }},
      {"pretokenizers[1].use_regex",
       [](Json& f) { f["pre_tokenizer"]["pretokenizers"][1].erase("use_regex"); }},
      {"post_processor: BertProcessing", [](Json& f) { f["post_processor"]["type"] = "BertProcessing"; }},
      {"decoder: null", [](Json& f) { f["decoder"] = nullptr; }},
      {"added_tokens[1].lstrip", [](Json& f) { f["added_tokens"][1]["lstrip"] = true; }},
      {"added_tokens[1].rstrip", [](Json& f) { f["added_tokens"][1]["rstrip"] = true; }},
      {"added_tokens[1].single_word", [](Json& f) { f["added_tokens"][1]["single_word"] = true; }},
  };
  for (const RefusalCase& c : cases) {
    Json file = SmallTokenizer();
    c.change(file);
    const auto tokenizer = Load(DumpJson(file));
    EXPECT_EQ(tokenizer.status().code(), absl::StatusCode::kUnimplemented) << c.named;
    EXPECT_THAT(std::string(Message(tokenizer.status())), HasSubstr(c.named));
    EXPECT_THAT(std::string(Message(tokenizer.status())), HasSubstr("tokenizer.json"));
  }
}

TEST_F(TokenizerTest, RefusesDamagedFiles) {
  const RefusalCase cases[] = {
      {"model.vocab: no token '!'", [](Json& f) { f["model"]["vocab"].erase("!"); }},
      {"model.vocab: id 1 is given to two", [](Json& f) { f["model"]["vocab"]["!"] = 1; }},
      {"model.vocab: a token id", [](Json& f) { f["model"]["vocab"]["!"] = -1; }},
      {"model.vocab: a token id", [](Json& f) { f["model"]["vocab"]["!"] = int64_t{1} << 40; }},
      {"model.vocab", [](Json& f) { f["model"]["vocab"] = Json::array(); }},
      {"model.merges[0]", [](Json& f) { f["model"]["merges"][0] = "no_space"; }},
      {"model.merges[2]",
       [](Json& f) {
         f["model"]["merges"][2] = Json::array({"q", "q"});
       }},
      {"model.merges", [](Json& f) { f["model"].erase("merges"); }},
      {"added_tokens[1]: id 272", [](Json& f) { f["added_tokens"][1]["id"] = 272; }},
      {"added_tokens[1]: 'hello'", [](Json& f) { f["added_tokens"][1]["content"] = "hello"; }},
      {"added_tokens[2]: '<role>' is given twice",
       [](Json& f) { f["added_tokens"][2]["content"] = "<role>"; }},
      {"added_tokens[0].content", [](Json& f) { f["added_tokens"][0]["content"] = ""; }},
      {"JSON object", [](Json& f) { f = Json::array(); }},
  };
  for (const RefusalCase& c : cases) {
    Json file = SmallTokenizer();
    c.change(file);
    const auto tokenizer = Load(DumpJson(file));
    EXPECT_TRUE(absl::IsInvalidArgument(tokenizer.status())) << c.named << ": " << tokenizer.status();
    EXPECT_THAT(std::string(Message(tokenizer.status())), HasSubstr(c.named));
  }
  EXPECT_THAT(std::string(Message(Load("{\"model\":").status())), HasSubstr("tokenizer.json: invalid JSON"));
  EXPECT_TRUE(absl::IsNotFound(Tokenizer::Load(directory_ + "/absent").status()));
}

struct SplitCase {
  std::string text;
  std::vector<std::string> pieces;
};

TEST(PretokenizerTest, SplitsAsTheReference) {
  const SplitCase cases[] = {
      {"I'll DON'T we'VE'Re x'S it'\305\277 'LLama 'v",
       {"I", "'ll", " DON", "'T", " we", "'VE", "'Re", " x", "'S", " it", "'\305\277", " '", "LLama", " '",
        "v"}},
      {"a1234b", {"a", "1", "2", "3", "4", "b"}},
      {"x  \n\n  y", {"x", "  \n\n", " ", " y"}},
      {"x   y", {"x", "  ", " y"}},
      {"x y", {"x", " y"}},
      {"trail   ", {"trail", "   "}},
      {"\015\n\015\nab", {"\015\n\015\n", "ab"}},
      {" !!\n\nx ?", {" !!\n\n", "x", " ?"}},
      {"\011\011word \302\240w", {"\011", "\011word", " ", "\302\240w"}},
      {"\343\200\200\342\200\250\302\205a", {"\343\200\200\342\200\250", "\302\205a"}},
      {"\344\270\255\346\226\207\343\200\202\302\275\342\205\247\331\243",
       {"\344\270\255\346\226\207", "\343\200\202", "\302\275", "\342\205\247", "\331\243"}},
      {"''s", {"''", "s"}},
      {"it'\305\277x'sx", {"it", "'\305\277", "x", "'s", "x"}},
      {"\n !", {"\n", " !"}},
      {"e\314\201\314\201a", {"e", "\314\201\314\201", "a"}},
      {"\360\237\230\200\342\200\215\360\237\230\200 x",
       {"\360\237\230\200\342\200\215\360\237\230\200", " x"}},
      {" '", {" '"}},
      {"\360\226\265\205\360\234\263\263", {"\360\226\265\205", "\360\234\263\263"}},
      {"'", {"'"}},
  };
  for (const SplitCase& c : cases) {
    std::vector<std::string> pieces;
    for (std::string_view rest = c.text; !rest.empty(); rest.remove_prefix(pieces.back().size())) {
      pieces.emplace_back(rest.substr(0, NextPieceBytes(rest)));
    }
    EXPECT_EQ(pieces, c.pieces) << c.text;
  }
}

TEST(NormalizerTest, ComposesAsTheReference) {
  EXPECT_EQ(NormalizeNfc("plain"), "plain");
  EXPECT_EQ(NormalizeNfc("e\xCC\x81"), "\xC3\xA9");
  EXPECT_EQ(NormalizeNfc("\xE2\x84\xAB"), "\xC3\x85");                              // angstrom sign
  EXPECT_EQ(NormalizeNfc("\xE1\x84\x92\xE1\x85\xA1\xE1\x86\xAB"), "\xED\x95\x9C");  // Hangul
  EXPECT_EQ(NormalizeNfc("q\xCC\x87\xCC\xA3"), "q\xCC\xA3\xCC\x87");                // marks in order
  EXPECT_EQ(NormalizeNfc("\xE0\xA5\x98"), "\xE0\xA4\x95\xE0\xA4\xBC");  // excluded from composition
  EXPECT_EQ(NormalizeNfc("a\xCD\x85\xE1\xAB\x80\xCC\xB4"),
            "a\xCD\x85\xE1\xAB\x80\xCC\xB4");  // opaque mark U+1AC0
}

TEST_F(TokenizerTest, DetokenizerHoldsBackIncompleteCodePoints) {
  const auto tokenizer = MustLoad(SmallTokenizer());
  ASSERT_NE(tokenizer, nullptr);
  const std::string text = "\xE4\xB8\xAD\xE6\x96\x87 \xF0\x9F\x98\x80!";
  const auto ids = tokenizer->Encode(text);
  Detokenizer detokenizer(*tokenizer);
  std::string streamed;
  for (const TokenId id : *ids) {
    const std::string piece = detokenizer.Push(id);
    EXPECT_TRUE(tokenizer->Encode(piece).ok()) << "half a code point after " << streamed;
    streamed.append(piece);
  }
  EXPECT_THAT(detokenizer.Finish(), IsEmpty());
  EXPECT_EQ(streamed, text);
}

// One token per byte of `bytes`, pushed one by one.
std::vector<std::string> PushBytes(const Tokenizer& tokenizer, const std::string& bytes) {
  Detokenizer detokenizer(tokenizer);
  std::vector<std::string> out;
  for (const char byte : bytes) {
    for (TokenId id = 0; id < 256; ++id) {
      if (tokenizer.Bytes(id) == std::string_view(&byte, 1)) out.push_back(detokenizer.Push(id));
    }
  }
  out.push_back(detokenizer.Finish());
  return out;
}

TEST_F(TokenizerTest, DetokenizerReplacesEachMaximalBadPrefixOnce) {
  const auto tokenizer = MustLoad(SmallTokenizer());
  ASSERT_NE(tokenizer, nullptr);
  const std::string bad = "\xEF\xBF\xBD";
  EXPECT_THAT(PushBytes(*tokenizer,
                        "\xFF"
                        "a"),
              ElementsAre(bad, "a", ""));
  EXPECT_THAT(PushBytes(*tokenizer,
                        "\xE4\xB8"
                        "a"),
              ElementsAre("", "", bad + "a", ""));
  EXPECT_THAT(PushBytes(*tokenizer, "\xF0\x9F\x98"), ElementsAre("", "", "", bad));
  EXPECT_THAT(PushBytes(*tokenizer, "\xED\xA0\x80"), ElementsAre("", bad + bad, bad, ""));
  EXPECT_THAT(PushBytes(*tokenizer, "\xE4\xC3\xA9"), ElementsAre("", bad, "\xC3\xA9", ""));
}

TEST_F(TokenizerTest, DetokenizerSkipsSpecialTokensOnlyWhenAskedTo) {
  const auto tokenizer = MustLoad(SmallTokenizer());
  ASSERT_NE(tokenizer, nullptr);
  Detokenizer skipping(*tokenizer);
  EXPECT_EQ(skipping.Push(273), "");
  EXPECT_EQ(skipping.Push(276), "<note>");
  Detokenizer keeping(*tokenizer, /*skip_special=*/false);
  EXPECT_EQ(keeping.Push(266), "");
  EXPECT_EQ(keeping.Push(273), "\xEF\xBF\xBD<role>");
}

}  // namespace
}  // namespace millrace::engine
