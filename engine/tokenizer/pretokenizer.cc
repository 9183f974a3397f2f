#include "engine/tokenizer/pretokenizer.h"

#include <utf8proc.h>

#include <algorithm>
#include <iterator>

#include "base/check.h"
#include "engine/tokenizer/utf8.h"

namespace millrace::engine {
namespace {

enum class CharClass { kLetter, kNumber, kNewline, kSpace, kOther };

struct ClassRange {
  char32_t first, last;
  CharClass char_class;
};

// Letters and numbers that Unicode 15.1 and 16 added. The regex engine of the reference tokenizer knows
// Unicode 16, while utf8proc may be older; a newer utf8proc agrees with these lines.
constexpr ClassRange kLateAssigned[] = {
    {0x1C89, 0x1C8A, CharClass::kLetter},   {0xA7CB, 0xA7CD, CharClass::kLetter},
    {0xA7DA, 0xA7DC, CharClass::kLetter},   {0x105C0, 0x105F3, CharClass::kLetter},
    {0x10D40, 0x10D49, CharClass::kNumber}, {0x10D4A, 0x10D65, CharClass::kLetter},
    {0x10D6F, 0x10D85, CharClass::kLetter}, {0x10EC2, 0x10EC4, CharClass::kLetter},
    {0x11380, 0x11389, CharClass::kLetter}, {0x1138B, 0x1138B, CharClass::kLetter},
    {0x1138E, 0x1138E, CharClass::kLetter}, {0x11390, 0x113B5, CharClass::kLetter},
    {0x113B7, 0x113B7, CharClass::kLetter}, {0x113D1, 0x113D1, CharClass::kLetter},
    {0x113D3, 0x113D3, CharClass::kLetter}, {0x116D0, 0x116E3, CharClass::kNumber},
    {0x11BC0, 0x11BE0, CharClass::kLetter}, {0x11BF0, 0x11BF9, CharClass::kNumber},
    {0x13460, 0x143FA, CharClass::kLetter}, {0x16100, 0x1611D, CharClass::kLetter},
    {0x16130, 0x16139, CharClass::kNumber}, {0x16D40, 0x16D6C, CharClass::kLetter},
    {0x16D70, 0x16D79, CharClass::kNumber}, {0x18CFF, 0x18CFF, CharClass::kLetter},
    {0x1CCF0, 0x1CCF9, CharClass::kNumber}, {0x1E5D0, 0x1E5ED, CharClass::kLetter},
    {0x1E5F0, 0x1E5F0, CharClass::kLetter}, {0x1E5F1, 0x1E5FA, CharClass::kNumber},
    {0x2EBF0, 0x2EE5D, CharClass::kLetter},
};

bool IsWideSpace(char32_t c) {
  return c == 0x85 || c == 0xA0 || c == 0x1680 || (c >= 0x2000 && c <= 0x200A) || c == 0x2028 ||
         c == 0x2029 || c == 0x202F || c == 0x205F || c == 0x3000;
}

CharClass Classify(char32_t c) {
  if (c < 0x80) {
    if ((c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z')) return CharClass::kLetter;
    if (c >= '0' && c <= '9') return CharClass::kNumber;
    if (c == '\r' || c == '\n') return CharClass::kNewline;
    return c == ' ' || (c >= '\t' && c <= '\r') ? CharClass::kSpace : CharClass::kOther;
  }
  if (IsWideSpace(c)) return CharClass::kSpace;
  switch (utf8proc_category(static_cast<utf8proc_int32_t>(c))) {
    case UTF8PROC_CATEGORY_LU:
    case UTF8PROC_CATEGORY_LL:
    case UTF8PROC_CATEGORY_LT:
    case UTF8PROC_CATEGORY_LM:
    case UTF8PROC_CATEGORY_LO:
      return CharClass::kLetter;
    case UTF8PROC_CATEGORY_ND:
    case UTF8PROC_CATEGORY_NL:
    case UTF8PROC_CATEGORY_NO:
      return CharClass::kNumber;
    case UTF8PROC_CATEGORY_CN: {
      const auto* range =
          std::upper_bound(std::begin(kLateAssigned), std::end(kLateAssigned), c,
                           [](char32_t value, const ClassRange& r) { return value < r.first; });
      if (range == std::begin(kLateAssigned) || c > std::prev(range)->last) return CharClass::kOther;
      return std::prev(range)->char_class;
    }
    default:
      return CharClass::kOther;
  }
}

struct Char {
  CharClass char_class;
  size_t bytes;  // 0 at the end of the text
};

Char CharAt(std::string_view text, size_t position) {
  if (position >= text.size()) return {CharClass::kOther, 0};
  const Utf8Step step = StepUtf8(text.substr(position));
  MR_CHECK(step.state == Utf8Step::State::kValid);
  return {Classify(step.code_point), step.bytes};
}

// End of the run of characters of one class that starts at `position`.
size_t SkipRun(std::string_view text, size_t position, CharClass char_class) {
  for (Char c = CharAt(text, position); c.bytes != 0 && c.char_class == char_class;
       c = CharAt(text, position)) {
    position += c.bytes;
  }
  return position;
}

// '(?i:[sdmt]|ll|ve|re), or 0. The long s folds to s; no other character outside ASCII folds to one of these
// letters.
size_t ContractionBytes(std::string_view text) {
  if (text[0] != '\'' || text.size() < 2) return 0;
  const auto lower = [text](size_t i) {
    const char c = i < text.size() ? text[i] : '\0';
    return c >= 'A' && c <= 'Z' ? static_cast<char>(c - 'A' + 'a') : c;
  };
  const char first = lower(1);
  const char second = lower(2);
  if (first == 's' || first == 'd' || first == 'm' || first == 't') return 2;
  if (text.substr(1).starts_with("\xC5\xBF")) return 3;
  if (first == 'l' && second == 'l') return 3;
  if ((first == 'v' || first == 'r') && second == 'e') return 3;
  return 0;
}

// The three white-space branches: through the last newline of the run; else the run up to the last character
// before a non-space; else the run.
size_t SpaceBytes(std::string_view text) {
  size_t end = 0;
  size_t after_newline = 0;
  size_t last_char = 0;
  for (Char c = CharAt(text, 0); c.bytes != 0; c = CharAt(text, end)) {
    if (c.char_class != CharClass::kSpace && c.char_class != CharClass::kNewline) break;
    last_char = end;
    end += c.bytes;
    if (c.char_class == CharClass::kNewline) after_newline = end;
  }
  if (after_newline != 0) return after_newline;
  return end < text.size() && last_char > 0 ? last_char : end;
}

}  // namespace

size_t NextPieceBytes(std::string_view rest) {
  MR_CHECK(!rest.empty());
  if (const size_t contraction = ContractionBytes(rest); contraction != 0) return contraction;
  const Char first = CharAt(rest, 0);
  if (first.char_class == CharClass::kLetter) return SkipRun(rest, first.bytes, CharClass::kLetter);
  if (first.char_class == CharClass::kNumber) return first.bytes;
  const Char second = CharAt(rest, first.bytes);
  // One character of any kind but newline may lead a word.
  if (first.char_class != CharClass::kNewline && second.bytes != 0 &&
      second.char_class == CharClass::kLetter) {
    return SkipRun(rest, first.bytes, CharClass::kLetter);
  }
  const bool space_then_other = rest[0] == ' ' && second.bytes != 0 && second.char_class == CharClass::kOther;
  if (first.char_class == CharClass::kOther || space_then_other) {
    return SkipRun(rest, SkipRun(rest, first.bytes, CharClass::kOther), CharClass::kNewline);
  }
  return SpaceBytes(rest);
}

}  // namespace millrace::engine
