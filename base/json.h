#pragma once
// The one place where nlohmann::json's exceptions are met. Parsed documents are read through checked
// accessors whose errors name the field.

#include <cstdint>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <string_view>

#include "base/status.h"

namespace millrace {

using Json = nlohmann::json;
// Keeps the order of keys: for anything that is rendered back to text.
using OrderedJson = nlohmann::ordered_json;

// Strict JSON, UTF-8 checked, nesting at most `depth_max`. InvalidArgument says where ("at byte 17: ...").
StatusOr<Json> ParseJson(std::string_view text, int depth_max = 64);
StatusOr<OrderedJson> ParseOrderedJson(std::string_view text, int depth_max = 64);

// Compact text. Strings that are not UTF-8 have their bad bytes replaced by U+FFFD.
std::string DumpJson(const Json& value);
std::string DumpJson(const OrderedJson& value);

// Checked reads of object[key]. Missing or null gives nullopt; a wrong type or range is InvalidArgument
// naming `key`.
StatusOr<std::optional<bool>> GetBool(const Json& object, const std::string& key);
StatusOr<std::optional<int64_t>> GetInt(const Json& object, const std::string& key);
StatusOr<std::optional<double>> GetNumber(const Json& object, const std::string& key);
StatusOr<std::optional<std::string>> GetString(const Json& object, const std::string& key);

}  // namespace millrace
