#pragma once
// A context-free grammar over bytes, as regular expressions that may refer to each other. Plain data: made by
// the front ends (regex, GBNF text, JSON schema), read by Automaton.

#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "base/status.h"

namespace millrace::engine {

// Immutable and shared between expressions.
struct Expression;
using ExpressionPtr = std::shared_ptr<const Expression>;

struct Expression {
  enum class Kind { kBytes, kSequence, kChoice, kRepeat, kRule };
  Kind kind = Kind::kSequence;                           // an empty sequence matches the empty string
  std::vector<std::pair<uint8_t, uint8_t>> ranges = {};  // kBytes: one byte of [first, second] of any
  std::vector<ExpressionPtr> parts = {};                 // kSequence, kChoice; kRepeat has one
  int32_t min = 0;                                       // kRepeat
  int32_t max = -1;                                      // kRepeat; -1 = no limit
  int32_t rule = 0;                                      // kRule
};

ExpressionPtr Literal(std::string_view bytes);
ExpressionPtr ByteRange(uint8_t first, uint8_t last);
ExpressionPtr Sequence(std::vector<ExpressionPtr> parts);
ExpressionPtr Choice(std::vector<ExpressionPtr> parts);  // not empty
ExpressionPtr Repeat(ExpressionPtr part, int32_t min, int32_t max);
inline ExpressionPtr Optional(ExpressionPtr part) { return Repeat(std::move(part), 0, 1); }
ExpressionPtr RuleCall(int32_t rule);
// One code point of the ranges (inclusive, sorted or not, surrogates are left out), in UTF-8.
ExpressionPtr CodePoints(std::vector<std::pair<uint32_t, uint32_t>> ranges);
// The complement of ranges over all code points.
std::vector<std::pair<uint32_t, uint32_t>> ComplementOf(std::vector<std::pair<uint32_t, uint32_t>> ranges);

struct Rule {
  std::string name;  // for errors
  ExpressionPtr body;
};

struct Grammar {
  std::vector<Rule> rules;  // rules[0] is where it begins

  int32_t Add(std::string name, ExpressionPtr body) {
    rules.push_back({std::move(name), std::move(body)});
    return static_cast<int32_t>(rules.size()) - 1;
  }
};

// The expression of a regular expression that must match the whole text: literals, ., classes, \d \w \s and
// their complements, \xHH \uHHHH, groups, |, ?, *, +, {m,n}; ^ first and $ last say nothing new.
// InvalidArgument names what is not supported (look-around, back references, \b) and where.
StatusOr<ExpressionPtr> ParseRegex(std::string_view pattern);

// Adds the rules of a GBNF text: `name ::= ...` lines with "literals", [classes], rule names, ( ), |, ?, *,
// +, {m,n} and # comments. The expression is a call of its `root`. InvalidArgument names place and fault.
StatusOr<ExpressionPtr> AddGbnf(std::string_view text, Grammar* grammar);

}  // namespace millrace::engine
