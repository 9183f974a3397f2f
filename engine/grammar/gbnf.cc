// GBNF text into a grammar: recursive descent over rules that may be used before they are defined.

#include <cctype>
#include <map>

#include "engine/grammar/grammar.h"
#include "engine/grammar/text_reader.h"

namespace millrace::engine {
namespace {

constexpr int kDepthMax = 64;
constexpr size_t kRulesMax = 1024;

class GbnfParser {
 public:
  GbnfParser(std::string_view text, Grammar* grammar) : reader_(text), grammar_(*grammar) {}

  StatusOr<ExpressionPtr> Parse() {
    const int32_t root = RuleOf("root");
    SkipSpace(true);
    while (!reader_.done()) {
      MR_ASSIGN_OR_RETURN(const std::string name, TakeName());
      SkipSpace(true);
      if (!reader_.Take("::=")) return reader_.Error("'::=' is expected after '{}'", name);
      SkipSpace(true);
      MR_ASSIGN_OR_RETURN(ExpressionPtr body, Alternatives(0));
      Rule& rule = grammar_.rules[static_cast<size_t>(RuleOf(name))];
      if (rule.body != nullptr) return reader_.Error("rule '{}' is there twice", name);
      rule.body = std::move(body);
      if (grammar_.rules.size() > kRulesMax) return reader_.Error("more than {} rules", kRulesMax);
      SkipSpace(true);
    }
    for (const auto& [name, rule] : ids_) {
      if (grammar_.rules[static_cast<size_t>(rule)].body == nullptr)
        return InvalidArgument("rule '{}' is used and not defined", name);
    }
    return RuleCall(root);
  }

 private:
  int32_t RuleOf(const std::string& name) {
    const auto [found, added] = ids_.try_emplace(name, static_cast<int32_t>(grammar_.rules.size()));
    if (added) grammar_.Add(name, nullptr);
    return found->second;
  }

  static bool IsName(char c) {
    return std::isalnum(static_cast<unsigned char>(c)) != 0 || c == '-' || c == '_';
  }

  StatusOr<std::string> TakeName() {
    std::string name;
    for (; IsName(reader_.peek()); reader_.Skip(1)) name += reader_.peek();
    if (name.empty()) return reader_.Error("a rule's name is expected");
    return name;
  }

  // With `lines`, also over ends of lines.
  void SkipSpace(bool lines) {
    while (!reader_.done()) {
      const char c = reader_.peek();
      if (c == '#') {
        while (!reader_.done() && reader_.peek() != '\n') reader_.Skip(1);
      } else if (c == ' ' || c == '\t' || (lines && (c == '\n' || c == '\r'))) {
        reader_.Skip(1);
      } else {
        return;
      }
    }
  }

  // A rule ends at the end of its line, unless an alternative or a group goes on.
  StatusOr<ExpressionPtr> Alternatives(int depth) {
    if (depth > kDepthMax) return reader_.Error("more than {} groups inside each other", kDepthMax);
    std::vector<ExpressionPtr> alternatives;
    while (true) {
      std::vector<ExpressionPtr> parts;
      while (true) {
        SkipSpace(depth > 0);
        const char c = reader_.peek();
        if (reader_.done() || c == '|' || c == ')' || c == '\n' || c == '\r') break;
        MR_ASSIGN_OR_RETURN(ExpressionPtr part, One(depth));
        MR_ASSIGN_OR_RETURN(part, reader_.TakeRepeat(std::move(part)));
        parts.push_back(std::move(part));
      }
      alternatives.push_back(Sequence(std::move(parts)));
      const TextReader before = reader_;
      SkipSpace(true);
      if (!reader_.Take("|")) {
        reader_ = before;
        return Choice(std::move(alternatives));
      }
      SkipSpace(true);
    }
  }

  StatusOr<ExpressionPtr> One(int depth) {
    if (reader_.Take("(")) {
      MR_ASSIGN_OR_RETURN(ExpressionPtr inside, Alternatives(depth + 1));
      SkipSpace(true);
      if (!reader_.Take(")")) return reader_.Error("a '(' without its ')'");
      return inside;
    }
    if (reader_.Take("[")) return reader_.TakeClass();
    if (reader_.Take(".")) return CodePoints({{0, 0x10FFFF}});
    if (reader_.Take("\"")) {
      std::vector<ExpressionPtr> parts;
      while (!reader_.Take("\"")) {
        if (reader_.done()) return reader_.Error("a literal without its '\"'");
        if (reader_.Take("\\")) {
          MR_ASSIGN_OR_RETURN(CodePointRanges ranges, reader_.TakeEscape());
          parts.push_back(CodePoints(std::move(ranges)));
        } else {
          MR_ASSIGN_OR_RETURN(const uint32_t code_point, reader_.TakeCodePoint());
          parts.push_back(CodePoints({{code_point, code_point}}));
        }
      }
      return Sequence(std::move(parts));
    }
    MR_ASSIGN_OR_RETURN(const std::string name, TakeName());
    return RuleCall(RuleOf(name));
  }

  TextReader reader_;
  Grammar& grammar_;
  std::map<std::string, int32_t> ids_;
};

}  // namespace

StatusOr<ExpressionPtr> AddGbnf(std::string_view text, Grammar* grammar) {
  auto parsed = GbnfParser(text, grammar).Parse();
  if (!parsed.ok()) return Annotate(parsed.status(), "grammar");
  return parsed;
}

}  // namespace millrace::engine
