#include "base/json.h"

#include <cmath>

namespace millrace {
namespace {

template <typename J>
StatusOr<J> Parse(std::string_view text, int depth_max) {
  // The parser recurses per level, so depth is bounded before it can hurt.
  int depth = 0;
  bool in_string = false;
  for (size_t i = 0; i < text.size(); ++i) {
    const char c = text[i];
    if (in_string) {
      if (c == '\\') ++i;
      if (c == '"') in_string = false;
    } else if (c == '"') {
      in_string = true;
    } else if (c == '{' || c == '[') {
      if (++depth > depth_max) return InvalidArgument("JSON is nested deeper than {} levels", depth_max);
    } else if (c == '}' || c == ']') {
      --depth;
    }
  }
  try {
    return J::parse(text.begin(), text.end());
  } catch (const nlohmann::json::exception& error) {
    std::string what = error.what();
    // "[json.exception.parse_error.101] parse error at line 1, column 2: ..." -> the part after the bracket.
    if (const size_t bracket = what.find("] "); bracket != std::string::npos) what.erase(0, bracket + 2);
    return InvalidArgument("invalid JSON: {}", what);
  }
}

template <typename J>
std::string Dump(const J& value) {
  return value.dump(-1, ' ', false, J::error_handler_t::replace);
}

const Json* Find(const Json& object, const std::string& key) {
  if (!object.is_object()) return nullptr;
  const auto found = object.find(key);
  if (found == object.end() || found->is_null()) return nullptr;
  return &*found;
}

}  // namespace

StatusOr<Json> ParseJson(std::string_view text, int depth_max) { return Parse<Json>(text, depth_max); }
StatusOr<OrderedJson> ParseOrderedJson(std::string_view text, int depth_max) {
  return Parse<OrderedJson>(text, depth_max);
}
std::string DumpJson(const Json& value) { return Dump(value); }
std::string DumpJson(const OrderedJson& value) { return Dump(value); }

StatusOr<std::optional<bool>> GetBool(const Json& object, const std::string& key) {
  const Json* value = Find(object, key);
  if (value == nullptr) return std::optional<bool>();
  if (!value->is_boolean()) return InvalidArgument("'{}' must be true or false", key);
  return std::optional<bool>(value->get<bool>());
}

StatusOr<std::optional<int64_t>> GetInt(const Json& object, const std::string& key) {
  const Json* value = Find(object, key);
  if (value == nullptr) return std::optional<int64_t>();
  if (value->is_number_float()) {
    const double number = value->get<double>();
    if (std::floor(number) == number && std::abs(number) < 9e15)
      return std::optional<int64_t>(static_cast<int64_t>(number));
  }
  if (!value->is_number_integer()) return InvalidArgument("'{}' must be an integer", key);
  if (value->is_number_unsigned() && value->get<uint64_t>() > static_cast<uint64_t>(INT64_MAX)) {
    return InvalidArgument("'{}' is too large", key);
  }
  return std::optional<int64_t>(value->get<int64_t>());
}

StatusOr<std::optional<double>> GetNumber(const Json& object, const std::string& key) {
  const Json* value = Find(object, key);
  if (value == nullptr) return std::optional<double>();
  if (!value->is_number()) return InvalidArgument("'{}' must be a number", key);
  return std::optional<double>(value->get<double>());
}

StatusOr<std::optional<std::string>> GetString(const Json& object, const std::string& key) {
  const Json* value = Find(object, key);
  if (value == nullptr) return std::optional<std::string>();
  if (!value->is_string()) return InvalidArgument("'{}' must be a string", key);
  return std::optional<std::string>(value->get<std::string>());
}

}  // namespace millrace
