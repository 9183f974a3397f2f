#include "engine/grammar/grammar.h"

#include <algorithm>

#include "base/check.h"

namespace millrace::engine {
namespace {

constexpr uint32_t kCodePointMax = 0x10FFFF;

ExpressionPtr Make(Expression expression) {
  return std::make_shared<const Expression>(std::move(expression));
}

int Utf8Length(uint32_t code_point) {
  return code_point < 0x80 ? 1 : code_point < 0x800 ? 2 : code_point < 0x10000 ? 3 : 4;
}

void Encode(uint32_t code_point, int length, uint8_t* out) {
  static constexpr uint8_t kLead[] = {0, 0, 0xC0, 0xE0, 0xF0};
  for (int i = length - 1; i > 0; --i) {
    out[i] = static_cast<uint8_t>(0x80U | (code_point & 0x3FU));
    code_point >>= 6;
  }
  out[0] = static_cast<uint8_t>(kLead[length] | code_point);
}

// Splits [first, last], all of one encoded length, until every byte position is a plain range: then the
// sequences of bytes between the two encodings are exactly the product of the ranges.
void AddUtf8Range(uint32_t first, uint32_t last, int length, std::vector<ExpressionPtr>* out) {
  for (int i = 1; i < length; ++i) {
    const uint32_t low_bits = (1U << (6 * i)) - 1;
    if ((first & ~low_bits) == (last & ~low_bits)) continue;
    if ((first & low_bits) != 0) {
      AddUtf8Range(first, first | low_bits, length, out);
      return AddUtf8Range((first | low_bits) + 1, last, length, out);
    }
    if ((last & low_bits) != low_bits) {
      AddUtf8Range(first, (last & ~low_bits) - 1, length, out);
      return AddUtf8Range(last & ~low_bits, last, length, out);
    }
  }
  uint8_t low[4];
  uint8_t high[4];
  Encode(first, length, low);
  Encode(last, length, high);
  std::vector<ExpressionPtr> bytes;
  for (int i = 0; i < length; ++i) bytes.push_back(ByteRange(low[i], high[i]));
  out->push_back(Sequence(std::move(bytes)));
}

void Normalize(std::vector<std::pair<uint32_t, uint32_t>>* ranges) {
  std::sort(ranges->begin(), ranges->end());
  std::vector<std::pair<uint32_t, uint32_t>> merged;
  for (const auto& range : *ranges) {
    if (!merged.empty() && range.first <= merged.back().second + 1) {
      merged.back().second = std::max(merged.back().second, range.second);
    } else {
      merged.push_back(range);
    }
  }
  *ranges = std::move(merged);
}

}  // namespace

ExpressionPtr Literal(std::string_view bytes) {
  Expression sequence{.kind = Expression::Kind::kSequence};
  for (const char c : bytes)
    sequence.parts.push_back(ByteRange(static_cast<uint8_t>(c), static_cast<uint8_t>(c)));
  return Make(std::move(sequence));
}

ExpressionPtr ByteRange(uint8_t first, uint8_t last) {
  return Make({.kind = Expression::Kind::kBytes, .ranges = {{first, last}}});
}

ExpressionPtr Sequence(std::vector<ExpressionPtr> parts) {
  return Make({.kind = Expression::Kind::kSequence, .parts = std::move(parts)});
}

ExpressionPtr Choice(std::vector<ExpressionPtr> parts) {
  MR_CHECK(!parts.empty(), "a choice of nothing");
  if (parts.size() == 1) return parts[0];
  return Make({.kind = Expression::Kind::kChoice, .parts = std::move(parts)});
}

ExpressionPtr Repeat(ExpressionPtr part, int32_t min, int32_t max) {
  MR_CHECK(min >= 0 && (max < 0 || max >= min), "repeat {} to {}", min, max);
  return Make({.kind = Expression::Kind::kRepeat, .parts = {std::move(part)}, .min = min, .max = max});
}

ExpressionPtr RuleCall(int32_t rule) { return Make({.kind = Expression::Kind::kRule, .rule = rule}); }

ExpressionPtr CodePoints(std::vector<std::pair<uint32_t, uint32_t>> ranges) {
  Normalize(&ranges);
  std::vector<ExpressionPtr> parts;
  Expression single{.kind = Expression::Kind::kBytes};  // all of ASCII in one
  static constexpr uint32_t kBorders[] = {0x7F, 0x7FF, 0xD7FF, 0xDFFF, 0xFFFF, kCodePointMax};
  for (auto [first, last] : ranges) {
    last = std::min(last, kCodePointMax);
    while (first <= last) {
      const uint32_t border = *std::lower_bound(std::begin(kBorders), std::end(kBorders), first);
      const uint32_t end = std::min(last, border);
      const bool surrogate = border == 0xDFFF;
      if (end <= 0x7F) {
        single.ranges.emplace_back(static_cast<uint8_t>(first), static_cast<uint8_t>(end));
      } else if (!surrogate) {
        AddUtf8Range(first, end, Utf8Length(first), &parts);
      }
      first = end + 1;
    }
  }
  if (!single.ranges.empty()) parts.push_back(Make(std::move(single)));
  MR_CHECK(!parts.empty(), "a class of no character");
  return Choice(std::move(parts));
}

std::vector<std::pair<uint32_t, uint32_t>> ComplementOf(std::vector<std::pair<uint32_t, uint32_t>> ranges) {
  Normalize(&ranges);
  std::vector<std::pair<uint32_t, uint32_t>> out;
  uint32_t next = 0;
  for (const auto& [first, last] : ranges) {
    if (first > next) out.emplace_back(next, first - 1);
    next = last + 1;
  }
  if (next <= kCodePointMax) out.emplace_back(next, kCodePointMax);
  return out;
}

}  // namespace millrace::engine
