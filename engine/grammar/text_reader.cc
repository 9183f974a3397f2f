#include "engine/grammar/text_reader.h"

#include <algorithm>
#include <cctype>

namespace millrace::engine {
namespace {

constexpr int32_t kRepeatMax = 4096;

const CodePointRanges kDigits = {{'0', '9'}};
const CodePointRanges kWord = {{'0', '9'}, {'A', 'Z'}, {'_', '_'}, {'a', 'z'}};
const CodePointRanges kSpace = {{'\t', '\r'}, {' ', ' '}};

}  // namespace

bool TextReader::Take(std::string_view what) {
  if (!Looks(what)) return false;
  at_ += what.size();
  return true;
}

StatusOr<uint32_t> TextReader::TakeCodePoint() {
  if (done()) return Error("the text ends too early");
  const auto lead = static_cast<uint8_t>(text_[at_]);
  const size_t length = lead < 0x80 ? 1 : lead < 0xE0 ? 2 : lead < 0xF0 ? 3 : 4;
  if ((lead >= 0x80 && lead < 0xC0) || at_ + length > text_.size()) return Error("not UTF-8");
  uint32_t code_point = length == 1 ? lead : lead & (0x7FU >> length);
  for (size_t i = 1; i < length; ++i)
    code_point = code_point << 6 | (static_cast<uint8_t>(text_[at_ + i]) & 0x3FU);
  if (code_point > 0x10FFFF || (code_point >= 0xD800 && code_point <= 0xDFFF)) return Error("not UTF-8");
  at_ += length;
  return code_point;
}

StatusOr<uint32_t> TextReader::TakeHex(int digits) {
  uint32_t value = 0;
  for (int i = 0; i < digits; ++i, ++at_) {
    const char c = peek();
    if (std::isxdigit(static_cast<unsigned char>(c)) == 0)
      return Error("{} hexadecimal digits are expected", digits);
    value = value * 16 + static_cast<uint32_t>(c <= '9' ? c - '0' : (c | 0x20) - 'a' + 10);
  }
  if (value > 0x10FFFF || (value >= 0xD800 && value <= 0xDFFF)) return Error("no such character");
  return value;
}

StatusOr<CodePointRanges> TextReader::TakeEscape() {
  if (done()) return Error("a lone backslash");
  const char c = text_[at_++];
  uint32_t value = 0;
  switch (c) {
    case 'd':
      return kDigits;
    case 'D':
      return ComplementOf(kDigits);
    case 'w':
      return kWord;
    case 'W':
      return ComplementOf(kWord);
    case 's':
      return kSpace;
    case 'S':
      return ComplementOf(kSpace);
    case 'n':
      value = '\n';
      break;
    case 'r':
      value = '\r';
      break;
    case 't':
      value = '\t';
      break;
    case 'f':
      value = '\f';
      break;
    case 'v':
      value = '\v';
      break;
    case '0':
      value = 0;
      break;
    case 'x': {
      MR_ASSIGN_OR_RETURN(value, TakeHex(2));
      break;
    }
    case 'u': {
      MR_ASSIGN_OR_RETURN(value, TakeHex(4));
      break;
    }
    case 'U': {
      MR_ASSIGN_OR_RETURN(value, TakeHex(8));
      break;
    }
    default:
      if (std::isalnum(static_cast<unsigned char>(c)) != 0 || static_cast<unsigned char>(c) >= 0x80)
        return Error("'\\{}' is not supported", c);
      value = static_cast<unsigned char>(c);
  }
  return CodePointRanges{{value, value}};
}

StatusOr<ExpressionPtr> TextReader::TakeClass() {
  const bool negated = Take("^");
  CodePointRanges ranges;
  for (bool first = true; first || peek() != ']'; first = false) {
    if (done()) return Error("a class without its ']'");
    CodePointRanges item;
    if (Take("\\")) {
      MR_ASSIGN_OR_RETURN(item, TakeEscape());
    } else {
      if (Looks("[:")) return Error("'[:name:]' is not supported");
      MR_ASSIGN_OR_RETURN(const uint32_t code_point, TakeCodePoint());
      item = {{code_point, code_point}};
    }
    const bool single = item.size() == 1 && item[0].first == item[0].second;
    if (single && peek() == '-' && text_.substr(at_).size() > 1 && text_[at_ + 1] != ']') {
      ++at_;
      uint32_t last = 0;
      if (Take("\\")) {
        MR_ASSIGN_OR_RETURN(const CodePointRanges end, TakeEscape());
        if (end.size() != 1 || end[0].first != end[0].second) return Error("a range to a class");
        last = end[0].first;
      } else {
        MR_ASSIGN_OR_RETURN(last, TakeCodePoint());
      }
      if (last < item[0].first) return Error("a range that runs backwards");
      item[0].second = last;
    }
    ranges.insert(ranges.end(), item.begin(), item.end());
  }
  ++at_;
  if (negated) ranges = ComplementOf(std::move(ranges));
  const bool only_surrogates = std::all_of(ranges.begin(), ranges.end(), [](const auto& range) {
    return range.first >= 0xD800 && range.second <= 0xDFFF;
  });
  if (ranges.empty() || only_surrogates) return Error("a class that holds nothing");
  return CodePoints(std::move(ranges));
}

StatusOr<int32_t> TextReader::TakeNumber() {
  if (std::isdigit(static_cast<unsigned char>(peek())) == 0) return Error("a number is expected");
  int32_t value = 0;
  for (; std::isdigit(static_cast<unsigned char>(peek())) != 0; ++at_) {
    value = value * 10 + (peek() - '0');
    if (value > kRepeatMax) return Error("more than {} repetitions", kRepeatMax);
  }
  return value;
}

StatusOr<ExpressionPtr> TextReader::TakeRepeat(ExpressionPtr part) {
  while (true) {
    int32_t min = 0;
    int32_t max = -1;
    if (Take("*")) {
    } else if (Take("+")) {
      min = 1;
    } else if (Take("?")) {
      max = 1;
    } else if (Take("{")) {
      if (peek() != ',') {
        MR_ASSIGN_OR_RETURN(min, TakeNumber());
      }
      max = min;
      if (Take(",")) {
        max = -1;
        if (peek() != '}') {
          MR_ASSIGN_OR_RETURN(max, TakeNumber());
        }
      }
      if (!Take("}")) return Error("'}}' is expected");
      if (max >= 0 && max < min) return Error("a repetition that runs backwards");
    } else {
      return part;
    }
    Take("?");  // lazy: the same texts match
    if (Looks("+")) return Error("possessive repetition is not supported");
    part = Repeat(std::move(part), min, max);
  }
}

}  // namespace millrace::engine
