// The reference of every mask is the plain one: a token is allowed exactly when its bytes, one after the
// other, lead somewhere.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <map>
#include <set>
#include <string>
#include <vector>

#include "base/random.h"
#include "engine/grammar/constraint.h"
#include "engine/grammar/grammar_mask.h"
#include "engine/grammar/matcher.h"
#include "engine/sampling/sampler.h"

namespace millrace::engine {
namespace {

using ::testing::HasSubstr;

const Tokenizer& DemoTokenizer() {
  static const std::unique_ptr<Tokenizer> tokenizer =
      *Tokenizer::Load(std::string(MILLRACE_SOURCE_DIR) + "/deploy/models/ling-tiny");
  return *tokenizer;
}

StatusOr<std::unique_ptr<const Automaton>> Compile(const std::string& constraint) {
  MR_ASSIGN_OR_RETURN(const Grammar grammar, BuildGrammar(constraint));
  return Automaton::Build(grammar);
}

std::string Quoted(const std::string& text) { return DumpJson(Json(text)); }
std::string RegexOf(const std::string& pattern) {
  return R"({"type":"regex","pattern":)" + Quoted(pattern) + "}";
}
std::string SchemaOf(const std::string& schema) {
  return R"({"type":"json_schema","schema":)" + schema + "}";
}
std::string GbnfOf(const std::string& text) { return R"({"type":"grammar","grammar":)" + Quoted(text) + "}"; }

bool Matches(const Automaton& automaton, const std::string& text) {
  Matcher matcher(automaton);
  Configs now = matcher.Start();
  Configs next;
  for (const char byte : text) {
    matcher.Step(now, static_cast<uint8_t>(byte), &next);
    std::swap(now, next);
  }
  return now.ends;
}

struct Case {
  std::string constraint;
  std::vector<std::string> good;
  std::vector<std::string> bad;
};

void Check(const std::vector<Case>& cases) {
  for (const Case& c : cases) {
    const auto automaton = Compile(c.constraint);
    ASSERT_TRUE(automaton.ok()) << c.constraint << ": " << automaton.status();
    for (const std::string& text : c.good)
      EXPECT_TRUE(Matches(**automaton, text)) << c.constraint << ": " << text;
    for (const std::string& text : c.bad)
      EXPECT_FALSE(Matches(**automaton, text)) << c.constraint << ": " << text;
  }
}

TEST(GrammarTest, MatchesRegularExpressions) {
  Check({
      {RegexOf("abc"), {"abc"}, {"", "ab", "abcd"}},
      {RegexOf("^a+b*c?$"), {"a", "aab", "abbc"}, {"", "b", "acc"}},
      {RegexOf("(ab|cd){2,3}"), {"abcd", "cdcdab"}, {"ab", "abababab"}},
      {RegexOf("[a-c]{2,}x"), {"abx", "abcabcx"}, {"ax", "adx"}},
      {RegexOf("[^0-9]"), {"a", "é", "語", "😀"}, {"7", "ab", "\xff"}},
      {RegexOf(R"(\d{3}-\w+\s\.)"), {"123-a_9 ."}, {"12-a .", "123-a !"}},
      {RegexOf(R"(\x41é\/[\]\-])"), {"Aé/]", "Aé/-"}, {"Aé/x"}},
      {RegexOf("."), {"a", "ü"}, {"", "\n"}},
      {RegexOf("(?:a|b)*?c"), {"c", "abac"}, {"ab"}},
      {RegexOf("(?P<first>a)(?<second>b)"), {"ab"}, {"a"}},
      {RegexOf("(a?)*b"), {"b", "aab"}, {"a"}},
      {R"({"type":"choice","choices":["yes","yes!","no"]})", {"yes", "yes!", "no"}, {"ye", "no!", ""}},
  });
}

TEST(GrammarTest, MatchesGbnf) {
  Check({
      {GbnfOf("root ::= \"a\" b # comment\nb ::= [0-9]+ | \"x\"\n"), {"a1", "a77", "ax"}, {"a", "axx"}},
      {GbnfOf("root ::= \"(\" root \")\" | \"x\""), {"x", "((x))"}, {"((x)", "x)"}},
      {GbnfOf("root ::= \"a\" root \"b\" | \"\""), {"", "ab", "aaabbb"}, {"aab", "abb"}},
      {GbnfOf("root ::= item (\",\" item)*\nitem ::= \"\\\"\" [a-z]* \"\\\"\"\n"),
       {"\"a\",\"\""},
       {"\"a\","}},
      {GbnfOf("root ::= list\nlist ::= \"x\" list | \"x\""), {"x", "xxxx"}, {""}},
      {GbnfOf("root ::= s{2}\n  | \"!\"\ns ::= ( \"a\"\n | \"b\" )\n"), {"ab", "!"}, {"a"}},
  });
}

TEST(GrammarTest, MatchesAfterThinking) {
  const std::string thinking = R"({"thinking":true,"type":"choice","choices":["yes","no"]})";
  const std::string gbnf =
      R"({"thinking":true,"type":"grammar","grammar":"root ::= \"(\" root \")\" | \"x\""})";
  Check({{thinking,
          {"</think>yes", "\n<think>\nWell, é 語 < 3 </ think> <</thin</</think>\n\nno", "a</think>\nyes",
           "<<</think>yes", "</thin</think>yes", "<think></think>no"},
          {"yes", "", "</think>", "a</think>maybe", "a</think>yes</think>yes", "a</think>\n\n\nyes",
           "a</think >yes", "\xff</think>yes", "</think></think>yes"}},
         {gbnf, {"a</think>x", "a</think>((x))"}, {"x", "a</think>(x", "a</think>(a</think>x)"}},
         {R"({"thinking":false,"type":"choice","choices":["yes","no"]})", {"yes"}, {"</think>yes"}}});
  // The reference: the constraint holds from behind the first end of thinking.
  const auto automaton = Compile(thinking);
  ASSERT_TRUE(automaton.ok());
  const char* const pieces[] = {"</think>", "</", "<", "think", ">", "yes", "no", "a", "/think>", "\n"};
  Random random(7);
  for (int round = 0; round < 20'000; ++round) {
    std::string text;
    for (uint64_t i = random.Below(8); i > 0; --i) text += pieces[random.Below(std::size(pieces))];
    const size_t end = text.find("</think>");
    std::string answer = end == std::string::npos ? "" : text.substr(end + 8);
    for (int i = 0; i < 2 && answer.starts_with("\n"); ++i) answer.erase(0, 1);
    ASSERT_EQ(Matches(**automaton, text), answer == "yes" || answer == "no") << text;
  }
}

TEST(GrammarTest, MatchesJson) {
  const std::string object = R"({"type":"json_object"})";
  Check(
      {{object,
        {"{}", R"({"a":1})", R"({"a": [1, -2.5e3, {"b": null}], "c": "\u00e9\n語"})", "{\n  \"a\": true\n}"},
        {"[]", "{", R"({"a":})", R"({a:1})", R"({"a":01})", R"({"a":1,})", "{\"a\":\"\n\"}",
         R"({"a":"\ud800"})", "{\"a\":\"\xff\"}"}}});
  std::string deep;
  for (int i = 0; i < 500; ++i) deep += R"({"a":[)";
  for (int i = 0; i < 500; ++i) deep += "]}";
  Check({{object, {deep}, {deep + "}"}}});
}

TEST(GrammarTest, MatchesSchemas) {
  Check({
      {SchemaOf(
           R"({"type":"object","properties":{"a":{"type":"integer"},"b":{"type":"string"}},"required":["a"]})"),
       {R"({"a":1})", R"({"a": 0, "b": "x"})"},
       {R"({"b":"x"})", R"({"a":1.5})", R"({"a":1,"b":2})", R"({"a":1,"c":2})", R"({"a":1,})"}},
      {SchemaOf(R"({"type":"object","properties":{"a":{"const":1},"b":{"const":2},"c":{"const":3}}})"),
       {"{}", R"({"a":1})", R"({"b":2,"c":3})", R"({"a":1,"c":3})", R"({"a":1,"b":2,"c":3})"},
       {R"({"c":3,"a":1})", R"({"a":1"b":2})", R"({,"b":2})"}},
      {SchemaOf(R"({"enum":["red","green",3,null]})"), {"\"red\"", "3", "null"}, {"red", "4"}},
      {SchemaOf(R"({"type":"array","items":{"type":"boolean"},"minItems":1,"maxItems":3})"),
       {"[true]", "[true, false,true]"},
       {"[]", "[true,true,true,true]", "[1]"}},
      {SchemaOf(R"({"type":"array","maxItems":0})"), {"[]"}, {"[1]"}},
      {SchemaOf(R"({"type":"string","minLength":2,"maxLength":3})"),
       {"\"ab\"", "\"日本語\"", "\"\\n\\u00e9\""},
       {"\"a\"", "\"abcd\""}},
      {SchemaOf(R"({"type":"string","pattern":"^[A-Z]\\d+$"})"), {"\"A12\""}, {"\"a12\"", "\"A12x\""}},
      {SchemaOf(R"({"type":"string","pattern":"\\d\""})"), {R"("a7\"b")"}, {R"("a7b")", R"("a7"b")"}},
      {SchemaOf(R"({"type":"string","format":"date"})"),
       {"\"2025-02-28\"", "\"0001-01-31\"", "\"2000-11-30\""},
       {"\"2025-13-01\"", "\"0000-01-01\"", "\"2025-02-29\"", "\"2025-04-31\"", "\"2025-01-32\""}},
      {SchemaOf(R"({"type":"string","format":"uuid"})"),
       {"\"123e4567-e89b-12d3-a456-426614174000\""},
       {"\"123\""}},
      {SchemaOf(R"({"type":["string","null"]})"), {"\"a\"", "null"}, {"1"}},
      {SchemaOf(R"({"anyOf":[{"type":"integer"},{"type":"object","properties":{"k":{"type":"null"}}}]})"),
       {"7", "{}", R"({"k":null})"},
       {"null"}},
      {SchemaOf(R"({"type":"integer","minimum":-12,"maximum":130})"),
       {"-12", "-9", "0", "7", "99", "130"},
       {"-13", "131", "-0", "007", "1000"}},
      {SchemaOf(R"({"type":"integer","exclusiveMinimum":0})"), {"1", "999999999999999"}, {"0", "-1"}},
      {SchemaOf(R"({"$defs":{"node":{"type":"object","properties":{"v":{"type":"integer"},
                   "next":{"anyOf":[{"$ref":"#/$defs/node"},{"type":"null"}]}},"required":["v","next"]}},
                   "$ref":"#/$defs/node"})"),
       {},
       {}},
      {SchemaOf(R"({"type":"object","additionalProperties":{"type":"integer"}})"),
       {"{}", R"({"x":1})"},
       {R"({"x":"1"})"}},
      {SchemaOf(R"({"type":"object","additionalProperties":false})"), {"{}"}, {R"({"x":1})"}},
      {SchemaOf(R"({"oneOf":[{"type":"string"},{"type":"null"}]})"), {"null"}, {"1"}},
      {SchemaOf("{}"), {"1", "[]", "\"a\""}, {""}},
      {R"({"type":"tool_calls","tools":[{"name":"f","parameters":{"type":"object","properties":{"a":{"type":"integer"}},
          "required":["a"]}},{"name":"g"}]})",
       {"<tool_call>\n{\"name\": \"f\", \"arguments\": {\"a\": 1}}\n</tool_call>",
        "<tool_call>\n{\"name\": \"g\", \"arguments\": {}}\n</tool_call>\n<tool_call>\n{\"name\": \"g\", "
        "\"arguments\": "
        "{\"x\": []}}\n</tool_call>"},
       {"<tool_call>\n{\"name\": \"h\", \"arguments\": {}}\n</tool_call>", ""}},
  });
}

TEST(GrammarTest, FollowsReferencesThatRecurse) {
  Check(
      {{SchemaOf(
            R"({"type":"object","properties":{"v":{"type":"integer"},"next":{"$ref":"#"}},"required":["v"]})"),
        {R"({"v":1})", R"({"v":1,"next":{"v":2,"next":{"v":3}}})"},
        {R"({"v":1,"next":null})"}}});
}

// Every whole number of a range, and none beside it.
TEST(GrammarTest, KeepsIntegerRanges) {
  Random random(7);
  for (int round = 0; round < 40; ++round) {
    const auto a = static_cast<int64_t>(random.Below(3000)) - 1500;
    const auto b = a + static_cast<int64_t>(random.Below(1200));
    const auto automaton =
        Compile(SchemaOf(fmt::format(R"({{"type":"integer","minimum":{},"maximum":{}}})", a, b)));
    ASSERT_TRUE(automaton.ok()) << automaton.status();
    for (int64_t n = -3100; n <= 3100; ++n)
      ASSERT_EQ(Matches(**automaton, std::to_string(n)), a <= n && n <= b) << n << " in " << a << " to " << b;
  }
}

TEST(GrammarTest, RefusesByName) {
  const struct {
    std::string constraint;
    std::string words;
  } cases[] = {
      {"[]", "object"},
      {R"({"type":"wish"})", "wish"},
      {RegexOf("(a"), "'('"},
      {RegexOf("a)"), "')'"},
      {RegexOf("(?=a)"), "(?="},
      {RegexOf(R"(\bword)"), "\\b"},
      {RegexOf(R"(a\1)"), "\\1"},
      {RegexOf("(?P<"), "'>'"},
      {RegexOf("a(?<name"), "'>'"},
      {RegexOf("[z-a]"), "backwards"},
      {RegexOf("[a"), "]"},
      {RegexOf("*a"), "repeats nothing"},
      {RegexOf("a{5,2}"), "backwards"},
      {RegexOf("a{99999}"), "4096"},
      {RegexOf(R"(\ud800)"), "no such character"},
      {RegexOf(std::string(200, '(')), "inside each other"},
      {RegexOf("((a{1000}){1000}){1000}"), "too large"},
      {GbnfOf("a ::= \"x\""), "root"},
      {GbnfOf("root ::= missing"), "missing"},
      {GbnfOf("root ::= root \"a\" | \"b\""), "left recursion"},
      {GbnfOf("root ::= a root \"x\" | \"b\"\na ::= \"\" | \"y\""), "left recursion"},
      {GbnfOf("root ::= \"a\" root"), "never end"},
      {GbnfOf("root ::= \"a\"\nroot ::= \"b\""), "twice"},
      {GbnfOf("root \"a\""), "::="},
      {SchemaOf("7"), "object"},
      {SchemaOf(R"({"type":"object","patternProperties":{}})"), "patternProperties"},
      {SchemaOf(R"({"type":"number","multipleOf":2})"), "multipleOf"},
      {SchemaOf(R"({"type":"array","uniqueItems":true})"), "uniqueItems"},
      {SchemaOf(R"({"not":{}})"), "not"},
      {SchemaOf(R"({"type":"string","format":"hostname"})"), "hostname"},
      {SchemaOf(R"({"type":"wish"})"), "type"},
      {SchemaOf(R"({"$ref":"http://elsewhere"})"), "elsewhere"},
      {SchemaOf(R"({"$ref":"#/nowhere"})"), "nowhere"},
      {SchemaOf(R"({"$ref":"#"})"), "never end"},
      {SchemaOf(R"({"enum":[]})"), "no value"},
      {SchemaOf(R"({"oneOf":[{"type":"string"},{"type":"string"}]})"), "oneOf"},
      {SchemaOf(R"({"type":"object","properties":{"a":{"type":"object","properties":{"b":{"if":{}}}}}})"),
       "#/properties/a/properties/b"},
  };
  for (const auto& c : cases) {
    const auto automaton = Compile(c.constraint);
    ASSERT_FALSE(automaton.ok()) << c.constraint.substr(0, 200);
    EXPECT_THAT(std::string(Message(automaton.status())), HasSubstr(c.words)) << c.constraint.substr(0, 200);
  }
}

const char* const kMaskSchemas[] = {
    R"({"type":"json_object"})",
    R"({"type":"json_schema","schema":{"type":"object","properties":{"name":{"type":"string","maxLength":12},
        "age":{"type":"integer","minimum":0,"maximum":150},"tags":{"type":"array","items":{"enum":["a","bc","déf"]},
        "maxItems":3}},"required":["name","tags"]}})",
    R"({"type":"json_schema","schema":{"type":"string","minLength":40,"maxLength":60}})",
    R"({"type":"regex","pattern":"[A-Z][a-z]{1,8}( [a-z]{1,8}){0,3}[.!?]"})",
    R"({"type":"choice","choices":["positive","negative","neutral"]})",
    R"({"type":"choice","choices":["positive","negative","neutral"],"thinking":true})",
    R"({"type":"grammar","grammar":"root ::= term ((\"+\" | \"*\") term)*\nterm ::= [0-9]{1,4} | \"(\" root \")\""})",
};

// Two states of one class cannot be told apart by as many bytes as was asked for, and long strings have few
// classes: those near their limits, and one for each way to be inside a character.
TEST(StateClassesTest, AreWhatAFewBytesCannotTellApart) {
  for (const std::string& constraint :
       {SchemaOf(R"({"type":"string","minLength":300,"maxLength":500})"), RegexOf("[a-c]{20,40}(x|yz)*"),
        SchemaOf(R"({"type":"array","items":{"type":"string","maxLength":30},"maxItems":40})"),
        GbnfOf("root ::= item{3,30} \"!\"\nitem ::= [ab] | \"(\" root \")\"")}) {
    const auto automaton = Compile(constraint);
    ASSERT_TRUE(automaton.ok()) << automaton.status();
    const size_t count = (*automaton)->num_states();
    for (const int32_t bytes : {0, 1, 3, 6}) {
      const std::vector<int32_t> classes = ClassesOfStates(**automaton, bytes);
      ASSERT_EQ(classes.size(), count);
      std::map<int32_t, Automaton::State> first;
      Random random(static_cast<uint64_t>(bytes));
      for (size_t i = 0; i < count; ++i) {
        const auto state = static_cast<Automaton::State>(i);
        const auto other = first.try_emplace(classes[i], state).first->second;
        if (other == state) continue;
        Matcher matcher(**automaton);
        for (int trial = 0; trial < 10; ++trial) {
          Configs a, b, next;
          a.list = {{state, 0}};
          b.list = {{other, 0}};
          for (int32_t k = 0; k < bytes; ++k) {
            const std::string_view likely = "abc()\"\\xyzu0d1\xc3\xa9,[] !";
            const auto byte = static_cast<uint8_t>(
                random.Below(4) == 0 ? random.Below(256) : likely[random.Below(likely.size())]);
            matcher.Step(a, byte, &next);
            std::swap(a, next);
            matcher.Step(b, byte, &next);
            std::swap(b, next);
            ASSERT_EQ(a.list.empty(), b.list.empty()) << constraint << ": " << state << ", " << other;
            ASSERT_EQ(a.ends, b.ends) << constraint << ": " << state << ", " << other;
          }
        }
      }
    }
  }
  const auto text = Compile(SchemaOf(R"({"type":"string","minLength":400,"maxLength":500})"));
  ASSERT_TRUE(text.ok());
  const auto count = [&](int32_t bytes) {
    const std::vector<int32_t> classes = ClassesOfStates(**text, bytes);
    return std::set<int32_t>(classes.begin(), classes.end()).size();
  };
  EXPECT_GT(count(100'000), 4'000U) << "all counts differ in the end";
  EXPECT_LT(count(10), 500U);
  EXPECT_LT(count(1), 50U);
}

// Draws answers at random under the mask, comparing it at every step with the plain reference; every answer
// that ends is a match, and there always is a way on.
TEST(GrammarMaskTest, AllowsWhatTheReferenceAllows) {
  const Tokenizer& tokenizer = DemoTokenizer();
  GrammarCache cache(tokenizer);
  for (const char* constraint : kMaskSchemas) {
    const auto automaton = Compile(constraint);
    ASSERT_TRUE(automaton.ok()) << automaton.status();
    for (uint64_t seed = 0; seed < 2; ++seed) {
      auto mask = cache.MaskFor(constraint);
      ASSERT_TRUE(mask.ok()) << mask.status();
      Random random(seed);
      Matcher matcher(**automaton);
      Configs now = matcher.Start();
      std::vector<int32_t> output;
      std::string text;
      for (int step = 0; step < 30; ++step) {
        const TokenMask::Allowed allowed = (*mask)->After(output);
        std::vector<int32_t> possible;
        for (int32_t token = 0; token < tokenizer.size(); ++token) {
          Configs after = now;
          Configs next;
          for (const char byte : tokenizer.Bytes(token)) {
            matcher.Step(after, static_cast<uint8_t>(byte), &next);
            std::swap(after, next);
          }
          const bool expected = !after.list.empty() && tokenizer.HasToken(token) &&
                                !tokenizer.IsSpecial(token) && !tokenizer.Bytes(token).empty();
          const auto index = static_cast<size_t>(token);
          const bool got = (allowed.tokens[index / 64] >> (index % 64) & 1U) != 0;
          ASSERT_EQ(got, expected) << constraint << ": '" << tokenizer.Bytes(token) << "' after '" << text
                                   << "'";
          if (got) possible.push_back(token);
        }
        ASSERT_EQ(allowed.may_end, now.ends);
        ASSERT_TRUE(!possible.empty() || allowed.may_end) << "a way on, after '" << text << "'";
        if (possible.empty() || (allowed.may_end && random.Below(4) == 0)) break;
        const int32_t token = possible[random.Below(possible.size())];
        output.push_back(token);
        text += tokenizer.Bytes(token);
        Configs next;
        for (const char byte : tokenizer.Bytes(token)) {
          matcher.Step(now, static_cast<uint8_t>(byte), &next);
          std::swap(now, next);
        }
      }
    }
  }
}

// A mask that has seen nothing says the same as one that has followed from the start, after going on, back
// and elsewhere: so an answer may continue on another worker, and drafts may be rejected.
TEST(GrammarMaskTest, IsAFunctionOfTheOutputAlone) {
  const Tokenizer& tokenizer = DemoTokenizer();
  GrammarCache cache(tokenizer);
  const auto output = *tokenizer.Encode(R"({"name": "Ada", "age": 36, "tags": ["a", "bc"]})");
  const auto other = *tokenizer.Encode(R"({"name": "Bob", "tags": []})");
  auto used = cache.MaskFor(kMaskSchemas[1]);
  ASSERT_TRUE(used.ok());
  Random random(3);
  for (int round = 0; round < 200; ++round) {
    const auto& from = random.Below(3) == 0 ? other : output;
    const auto prefix = std::span(from).first(random.Below(from.size() + 1));
    auto fresh = cache.MaskFor(kMaskSchemas[1]);
    const auto a = (*used)->After(prefix);
    const auto b = (*fresh)->After(prefix);
    ASSERT_TRUE(std::equal(a.tokens.begin(), a.tokens.end(), b.tokens.begin(), b.tokens.end()));
    ASSERT_EQ(a.may_end, b.may_end);
  }
}

// Whatever clients ask for, what is kept stays within its bytes; and what has gone is found again, the same.
TEST(GrammarMaskTest, KeepsNoMoreThanItsBytes) {
  const Tokenizer& tokenizer = DemoTokenizer();
  GrammarCacheOptions tight;
  tight.grammars_bytes_max = 100'000;
  tight.tokens_bytes_max = 20'000;
  GrammarCache small(tokenizer, tight);
  GrammarCache large(tokenizer);
  size_t grammars_most = 0;
  size_t tokens_most = 0;
  for (int i = 0; i < 60; ++i) {
    // Every third one is asked for again and again.
    const std::string pattern = "[a-z]{2," + std::to_string(i % 3 == 0 ? 40 : 40 + i) + "} (yes|no|[0-9]+)";
    const std::string constraint = R"({"type":"regex","pattern":")" + pattern + R"("})";
    const auto a = small.MaskFor(constraint);
    const auto b = large.MaskFor(constraint);
    ASSERT_TRUE(a.ok() && b.ok());
    std::vector<int32_t> output;
    for (const char* piece : {"", "ab", "cde", " ", "12", "3"}) {
      const auto tokens = *tokenizer.Encode(piece);
      output.insert(output.end(), tokens.begin(), tokens.end());
      const auto here = (*a)->After(output);
      const auto there = (*b)->After(output);
      ASSERT_TRUE(
          std::equal(here.tokens.begin(), here.tokens.end(), there.tokens.begin(), there.tokens.end()))
          << pattern << " after " << output.size();
      ASSERT_EQ(here.may_end, there.may_end);
    }
    ASSERT_LE(small.grammars_bytes(), tight.grammars_bytes_max);
    ASSERT_LE(small.tokens_bytes(), tight.tokens_bytes_max);
    grammars_most = std::max(grammars_most, small.grammars_bytes());
    tokens_most = std::max(tokens_most, small.tokens_bytes());
  }
  EXPECT_GT(grammars_most, tight.grammars_bytes_max / 2) << "some are kept";
  EXPECT_GT(tokens_most, tight.tokens_bytes_max / 2);
  EXPECT_GT(large.tokens_bytes(), 4 * tight.tokens_bytes_max) << "there was more than the small one may keep";
  EXPECT_GT(large.grammars_bytes(), 4 * tight.grammars_bytes_max);
}

TEST(GrammarMaskTest, HoldsFromTheEndOfThinkingOn) {
  const Tokenizer& tokenizer = DemoTokenizer();
  GrammarCache cache(tokenizer);
  const std::string schema =
      R"("type":"json_schema","schema":{"type":"object","required":["a"],"properties":{"a":{"const":1}}}})";
  auto plain = cache.MaskFor("{" + schema);
  auto thinking = cache.MaskFor(R"({"thinking":true,)" + schema);
  ASSERT_TRUE(plain.ok() && thinking.ok());
  const auto reasoning = *tokenizer.Encode("\n<think>\nLet me see: </thin, {\"a\":2}.\n</think>");
  for (size_t i = 0; i < reasoning.size(); ++i) {
    const auto allowed = (*thinking)->After(std::span(reasoning).first(i));
    EXPECT_FALSE(allowed.may_end) << "the answer has not begun";
    const auto next = static_cast<size_t>(reasoning[i]);
    EXPECT_TRUE(allowed.tokens[next / 64] >> (next % 64) & 1U) << i;
  }
  auto output = reasoning;
  const auto answer = *tokenizer.Encode("{\"a\": 1}");
  for (size_t i = 0; i <= answer.size(); ++i) {
    const auto a = (*thinking)->After(output);
    const std::vector<uint64_t> tokens(a.tokens.begin(), a.tokens.end());
    const auto b = (*plain)->After(std::span(answer).first(i));
    // Directly behind the tag its line may end first.
    if (i > 0) {
      EXPECT_TRUE(std::equal(tokens.begin(), tokens.end(), b.tokens.begin(), b.tokens.end())) << i;
    }
    EXPECT_EQ(a.may_end, b.may_end) << i;
    if (i < answer.size()) output.push_back(answer[i]);
  }
}

TEST(GrammarMaskTest, HoldsTheSamplerToTheGrammar) {
  const Tokenizer& tokenizer = DemoTokenizer();
  GrammarCache cache(tokenizer);
  const std::vector<int32_t> end = {*tokenizer.Find("<|role_end|>")};
  for (uint64_t seed = 1; seed <= 20; ++seed) {
    SamplingParams params;
    params.seed = seed;
    params.temperature = 2;
    params.mask = *cache.MaskFor(R"({"type":"choice","choices":["positive","negative","neutral"]})");
    std::vector<float> logits(static_cast<size_t>(tokenizer.size()));
    Random random(seed);
    std::vector<int32_t> output;
    while (true) {
      for (float& logit : logits) logit = static_cast<float>(random.Uniform() * 20);
      const SampleInput input{.logits = logits,
                              .prompt = {},
                              .output = output,
                              .end_tokens = end,
                              .num_tokens_in_vocabulary = tokenizer.size()};
      const int32_t token = Sample(input, params).token;
      if (token == end[0]) break;
      output.push_back(token);
      ASSERT_LT(output.size(), 10U);
    }
    const std::string text = tokenizer.Decode(output, false);
    EXPECT_TRUE(text == "positive" || text == "negative" || text == "neutral") << text;
  }
}

}  // namespace
}  // namespace millrace::engine
