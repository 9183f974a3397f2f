#include "server/gateway/answer_text.h"

#include <gtest/gtest.h>

#include <string>
#include <string_view>
#include <vector>

#include "tests/server/small_tokenizer.h"

namespace millrace::server {
namespace {

class AnswerTextTest : public ::testing::Test {
 protected:
  AnswerText Make(std::vector<std::string> stop, bool skip_special = true) {
    return AnswerText(*tokenizer_, std::move(stop), skip_special);
  }
  // Pushes one token per byte; what came out of each, joined by '|', until a stop string is met.
  std::string PushBytes(AnswerText& answer, std::string_view bytes) {
    std::string out;
    for (const char byte : bytes) {
      const AnswerText::Delta delta = answer.Push(tokenizer_.Byte(static_cast<unsigned char>(byte)));
      out += delta.text + "|";
      if (delta.stopped) return out + "STOP";
    }
    return out;
  }

  SmallTokenizer tokenizer_;
};

TEST_F(AnswerTextTest, LetsTextPassWhenNothingCanStopIt) {
  AnswerText answer = Make({});
  EXPECT_EQ(PushBytes(answer, "abc"), "a|b|c|");
  EXPECT_EQ(answer.Push(kHelloToken).text, "hello");
  const AnswerText::Delta last = answer.Finish();
  EXPECT_EQ(last.text, "");
  EXPECT_FALSE(last.stopped);
}

TEST_F(AnswerTextTest, MeetsAStopStringThatSpansTokens) {
  AnswerText answer = Make({"xyz"});
  EXPECT_EQ(PushBytes(answer, "abxyz"), "a|b||||STOP");
}

TEST_F(AnswerTextTest, StopsInTheMiddleOfAToken) {
  AnswerText answer = Make({"ll"});
  const AnswerText::Delta delta = answer.Push(kHelloToken);
  EXPECT_TRUE(delta.stopped);
  EXPECT_EQ(delta.text, "he");
  EXPECT_EQ(answer.Finish().text, "") << "nothing after the stop string may come out";
}

TEST_F(AnswerTextTest, StopsOverTheBorderOfATokenOfSeveralCharacters) {
  AnswerText answer = Make({"lo w"});
  EXPECT_EQ(answer.Push(kHelloToken).text, "hel");
  EXPECT_EQ(PushBytes(answer, " w"), "||STOP");
}

TEST_F(AnswerTextTest, HoldsOnlyWhatCanStillBecomeAStopString) {
  AnswerText answer = Make({"abc"});
  EXPECT_EQ(PushBytes(answer, "ab"), "||");
  EXPECT_EQ(PushBytes(answer, "d"), "abd|");
  EXPECT_EQ(PushBytes(answer, "aab"), "|a||");  // the second 'a' begins anew
  EXPECT_EQ(PushBytes(answer, "c"), "|STOP");
}

TEST_F(AnswerTextTest, ReleasesTheHeldPrefixWhenTheAnswerEnds) {
  AnswerText answer = Make({"abc"});
  EXPECT_EQ(PushBytes(answer, "xab"), "x|||");
  const AnswerText::Delta last = answer.Finish();
  EXPECT_EQ(last.text, "ab");
  EXPECT_FALSE(last.stopped);
}

TEST_F(AnswerTextTest, TakesTheEarliestOfSeveralStopStrings) {
  AnswerText answer = Make({"lo", "el"});
  const AnswerText::Delta delta = answer.Push(kHelloToken);
  EXPECT_TRUE(delta.stopped);
  EXPECT_EQ(delta.text, "h");
}

TEST_F(AnswerTextTest, HoldsTheLongestPrefixOfAnyStopString) {
  AnswerText answer = Make({"bz", "abq"});
  EXPECT_EQ(PushBytes(answer, "ab"), "||");
  EXPECT_EQ(PushBytes(answer, "z"), "a|STOP");
}

TEST_F(AnswerTextTest, NeverSplitsACodePoint) {
  AnswerText answer = Make({});
  EXPECT_EQ(PushBytes(answer, "\xE4\xB8\xAD"), "||\xE4\xB8\xAD|");
  EXPECT_EQ(PushBytes(answer, "\xF0\x9F\x8E\xBB"), "|||\xF0\x9F\x8E\xBB|");
}

TEST_F(AnswerTextTest, MeetsAStopStringOfSeveralByteCharacters) {
  AnswerText answer = Make({"\xE4\xB8\xAD\xE6\x96\x87"});
  EXPECT_EQ(PushBytes(answer, "a\xE4\xB8\xAD\xE6\x96\x87"), "a|||||||STOP");
}

TEST_F(AnswerTextTest, ReplacesBytesThatCanNeverBeText) {
  AnswerText answer = Make({});
  EXPECT_EQ(PushBytes(answer, "\xE4\xB8"), "||");
  EXPECT_EQ(answer.Finish().text, "\xEF\xBF\xBD");
}

TEST_F(AnswerTextTest, ShowsSpecialTokensOnlyWhenAsked) {
  AnswerText hidden = Make({});
  EXPECT_EQ(hidden.Push(kEndToken).text, "");
  AnswerText shown = Make({}, /*skip_special=*/false);
  EXPECT_EQ(shown.Push(kEndToken).text, "<|role_end|>");
}

TEST_F(AnswerTextTest, KeepsTheStopStringWhenAskedTo) {
  AnswerText text(*tokenizer_, {"lo", "ell"}, true, /*include_stop=*/true);
  const AnswerText::Delta delta = text.Push(kHelloToken);
  EXPECT_EQ(delta.text, "hell") << "the earliest one counts";
  EXPECT_TRUE(delta.stopped);
}

}  // namespace
}  // namespace millrace::server
