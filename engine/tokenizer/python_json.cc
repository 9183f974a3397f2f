#include <array>
#include <charconv>
#include <cmath>
#include <string>
#include <string_view>

#include "engine/tokenizer/chat_format.h"

namespace millrace::engine {
namespace {

void AppendString(std::string_view text, std::string& out) {
  out.push_back('"');
  for (const char c : text) {
    switch (c) {
      case '"':
        out.append("\\\"");
        break;
      case '\\':
        out.append("\\\\");
        break;
      case '\b':
        out.append("\\b");
        break;
      case '\f':
        out.append("\\f");
        break;
      case '\n':
        out.append("\\n");
        break;
      case '\r':
        out.append("\\r");
        break;
      case '\t':
        out.append("\\t");
        break;
      default:
        if (static_cast<unsigned char>(c) < 0x20) {
          out.append(fmt::format("\\u{:04x}", static_cast<unsigned>(c)));
        } else {
          out.push_back(c);
        }
    }
  }
  out.push_back('"');
}

// float.__repr__: the shortest digits that read back as `value`, in positional form for exponents -4 to 15.
void AppendFloat(double value, std::string& out) {
  if (std::isnan(value)) return void(out.append("NaN"));
  if (std::signbit(value)) out.push_back('-');
  value = std::abs(value);
  if (std::isinf(value)) return void(out.append("Infinity"));
  std::array<char, 40> buffer;  // d.ddddde+ddd, at most 17 digits
  const auto written =
      std::to_chars(buffer.data(), buffer.data() + buffer.size(), value, std::chars_format::scientific);
  const std::string_view text(buffer.data(), static_cast<size_t>(written.ptr - buffer.data()));
  const size_t e = text.find('e');
  int exponent = 0;
  const size_t exponent_begin = e + (text[e + 1] == '+' ? 2 : 1);
  std::from_chars(text.data() + exponent_begin, text.data() + text.size(), exponent);
  if (exponent < -4 || exponent >= 16)
    return void(out.append(text));  // both write at least two exponent digits
  std::string digits(text.substr(0, 1));
  if (e > 2) digits.append(text.substr(2, e - 2));
  if (exponent < 0) {
    out.append("0.").append(static_cast<size_t>(-exponent - 1), '0').append(digits);
    return;
  }
  const size_t num_whole = static_cast<size_t>(exponent) + 1;
  if (digits.size() <= num_whole) {
    out.append(digits).append(num_whole - digits.size(), '0').append(".0");
  } else {
    out.append(digits, 0, num_whole).append(".").append(digits, num_whole);
  }
}

void Append(const OrderedJson& value, std::string& out) {
  std::string_view separator;
  if (value.is_object()) {
    out.push_back('{');
    for (const auto& [key, member] : value.items()) {
      out.append(separator);
      AppendString(key, out);
      out.append(": ");
      Append(member, out);
      separator = ", ";
    }
    out.push_back('}');
  } else if (value.is_array()) {
    out.push_back('[');
    for (const OrderedJson& element : value) {
      out.append(separator);
      Append(element, out);
      separator = ", ";
    }
    out.push_back(']');
  } else if (value.is_string()) {
    AppendString(value.get_ref<const std::string&>(), out);
  } else if (value.is_number_float()) {
    AppendFloat(value.get<double>(), out);
  } else {
    out.append(DumpJson(value));  // null, true, false and integers are spelt alike
  }
}

}  // namespace

std::string PythonJson(const OrderedJson& value) {
  std::string out;
  Append(value, out);
  return out;
}

}  // namespace millrace::engine
