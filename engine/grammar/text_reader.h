#pragma once
// What regular expressions and GBNF share: escapes, character classes and repetition marks.

#include <algorithm>
#include <cstdint>
#include <string_view>
#include <utility>
#include <vector>

#include "engine/grammar/grammar.h"

namespace millrace::engine {

using CodePointRanges = std::vector<std::pair<uint32_t, uint32_t>>;

// A position in a text. Errors say where as "at byte N".
class TextReader {
 public:
  explicit TextReader(std::string_view text) : text_(text) {}

  bool done() const { return at_ >= text_.size(); }
  char peek() const { return done() ? '\0' : text_[at_]; }
  bool Looks(std::string_view what) const { return text_.substr(at_).starts_with(what); }
  bool Take(std::string_view what);
  size_t at() const { return at_; }
  void Skip(size_t bytes) { at_ = std::min(at_ + bytes, text_.size()); }
  std::string_view rest() const { return text_.substr(at_); }

  template <typename... Args>
  Status Error(fmt::format_string<Args...> format, Args&&... args) const {
    return InvalidArgument("{} at byte {}", fmt::format(format, std::forward<Args>(args)...), at_);
  }

  StatusOr<uint32_t> TakeCodePoint();
  // After a backslash: one character (\n, \x41, \u00e9, \U0001F600, \. ...), or a class (\d \w \s \D \W \S).
  StatusOr<CodePointRanges> TakeEscape();
  // After '[': up to and with ']'.
  StatusOr<ExpressionPtr> TakeClass();
  // `part` with the repetition marks that follow it.
  StatusOr<ExpressionPtr> TakeRepeat(ExpressionPtr part);

 private:
  StatusOr<uint32_t> TakeHex(int digits);
  StatusOr<int32_t> TakeNumber();

  std::string_view text_;
  size_t at_ = 0;
};

}  // namespace millrace::engine
