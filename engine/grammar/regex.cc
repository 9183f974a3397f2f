// Regular expressions into grammar expressions: recursive descent.

#include "engine/grammar/grammar.h"
#include "engine/grammar/text_reader.h"

namespace millrace::engine {
namespace {

constexpr int kDepthMax = 64;

class RegexParser {
 public:
  explicit RegexParser(std::string_view pattern) : reader_(pattern) {}

  StatusOr<ExpressionPtr> Parse() {
    reader_.Take("^");
    MR_ASSIGN_OR_RETURN(ExpressionPtr expression, Alternatives(0));
    if (!reader_.done()) return reader_.Error("a ')' without its '('");
    return expression;
  }

 private:
  StatusOr<ExpressionPtr> Alternatives(int depth) {
    if (depth > kDepthMax) return reader_.Error("more than {} groups inside each other", kDepthMax);
    std::vector<ExpressionPtr> alternatives;
    do {
      std::vector<ExpressionPtr> parts;
      while (!reader_.done() && reader_.peek() != '|' && reader_.peek() != ')') {
        if (reader_.Looks("$")) {
          if (reader_.rest().size() > 1) return reader_.Error("'$' before the end is not supported");
          reader_.Skip(1);
          break;
        }
        MR_ASSIGN_OR_RETURN(ExpressionPtr part, One(depth));
        MR_ASSIGN_OR_RETURN(part, reader_.TakeRepeat(std::move(part)));
        parts.push_back(std::move(part));
      }
      alternatives.push_back(Sequence(std::move(parts)));
    } while (reader_.Take("|"));
    return Choice(std::move(alternatives));
  }

  StatusOr<ExpressionPtr> One(int depth) {
    if (reader_.Take("(")) {
      if (reader_.Looks("?") && !reader_.Looks("?:") && !reader_.Looks("?P<") && !reader_.Looks("?<"))
        return reader_.Error("'({}' is not supported", reader_.rest().substr(0, 2));
      if (reader_.Looks("?<=") || reader_.Looks("?<!")) return reader_.Error("look-behind is not supported");
      if (reader_.Take("?P<") || reader_.Take("?<")) {  // a name says nothing here
        while (!reader_.done() && reader_.peek() != '>') reader_.Skip(1);
        if (!reader_.Take(">")) return reader_.Error("a group's name without its '>'");
      }
      reader_.Take("?:");
      MR_ASSIGN_OR_RETURN(ExpressionPtr inside, Alternatives(depth + 1));
      if (!reader_.Take(")")) return reader_.Error("a '(' without its ')'");
      return inside;
    }
    if (reader_.Take("[")) return reader_.TakeClass();
    if (reader_.Take(".")) return CodePoints(ComplementOf({{'\n', '\n'}}));
    if (reader_.Take("\\")) {
      MR_ASSIGN_OR_RETURN(CodePointRanges ranges, reader_.TakeEscape());
      return CodePoints(std::move(ranges));
    }
    const char c = reader_.peek();
    if (c == '*' || c == '+' || c == '?' || c == '{') return reader_.Error("'{}' repeats nothing", c);
    if (c == '^') return reader_.Error("'^' after the start is not supported");
    MR_ASSIGN_OR_RETURN(const uint32_t code_point, reader_.TakeCodePoint());
    return CodePoints({{code_point, code_point}});
  }

  TextReader reader_;
};

}  // namespace

StatusOr<ExpressionPtr> ParseRegex(std::string_view pattern) {
  auto parsed = RegexParser(pattern).Parse();
  if (!parsed.ok()) return Annotate(parsed.status(), "regular expression");
  return parsed;
}

}  // namespace millrace::engine
