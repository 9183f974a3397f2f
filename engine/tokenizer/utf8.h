#pragma once
// One step of UTF-8 decoding, shared by the encoder (which refuses bad text) and the detokenizer (which
// repairs it).

#include <cstddef>
#include <string>
#include <string_view>

namespace millrace::engine {

struct Utf8Step {
  enum class State { kValid, kInvalid, kIncomplete };
  State state;
  char32_t code_point;  // only when kValid
  // kValid: bytes of the code point. kInvalid: bytes of the maximal bad prefix, at least 1. kIncomplete: all
  // bytes that are left; more could make them a code point.
  size_t bytes;
};

// Decodes at the start of `text`, which is not empty. Surrogates, overlong forms and values over U+10FFFF are
// invalid.
inline Utf8Step StepUtf8(std::string_view text) {
  using State = Utf8Step::State;
  const auto lead = static_cast<unsigned char>(text[0]);
  if (lead < 0x80) return {State::kValid, lead, 1};
  if (lead < 0xC2 || lead > 0xF4) return {State::kInvalid, 0, 1};
  const size_t length = lead < 0xE0 ? 2 : lead < 0xF0 ? 3 : 4;
  char32_t code_point = lead & (0x7Fu >> length);
  for (size_t i = 1; i < length; ++i) {
    if (i == text.size()) return {State::kIncomplete, 0, i};
    const auto byte = static_cast<unsigned char>(text[i]);
    unsigned char low = 0x80;
    unsigned char high = 0xBF;
    if (i == 1) {  // the second byte alone decides about overlong forms, surrogates and the upper end
      if (lead == 0xE0) low = 0xA0;
      if (lead == 0xED) high = 0x9F;
      if (lead == 0xF0) low = 0x90;
      if (lead == 0xF4) high = 0x8F;
    }
    if (byte < low || byte > high) return {State::kInvalid, 0, i};
    code_point = (code_point << 6) | (byte & 0x3Fu);
  }
  return {State::kValid, code_point, length};
}

// Appends a Unicode scalar value.
inline void AppendUtf8(char32_t code_point, std::string& out) {
  const auto put = [&out](char32_t byte) { out.push_back(static_cast<char>(byte)); };
  if (code_point < 0x80) return put(code_point);
  if (code_point < 0x800) {
    put(0xC0 | (code_point >> 6));
  } else {
    if (code_point < 0x10000) {
      put(0xE0 | (code_point >> 12));
    } else {
      put(0xF0 | (code_point >> 18));
      put(0x80 | ((code_point >> 12) & 0x3F));
    }
    put(0x80 | ((code_point >> 6) & 0x3F));
  }
  put(0x80 | (code_point & 0x3F));
}

}  // namespace millrace::engine
