#pragma once
// Checked reads of one JSON object's fields. The first error wins and names the field.

#include <cmath>
#include <optional>
#include <string>
#include <vector>

#include "base/json.h"
#include "server/gateway/api_error.h"

namespace millrace::server {

// Absent and null fields leave *out as it is. The object outlives this. One thread at a time.
class Fields {
 public:
  explicit Fields(const Json& body) : body_(body) {}

  bool Has(const char* key) const { return body_.contains(key) && !body_[key].is_null(); }

  template <typename T>
  void Number(const char* key, double low, double high, T* out) {
    if (error_ || !Has(key)) return;
    const auto value = GetNumber(body_, key);
    if (!value.ok()) return Fail(key, std::string(Message(value.status())));
    if (!std::isfinite(**value) || **value < low || **value > high) {
      return Fail(key, fmt::format("'{}' must be between {} and {}, not {}", key, low, high, **value));
    }
    *out = static_cast<T>(**value);
  }
  void Integer(const char* key, int64_t low, int64_t high, int32_t* out) {
    if (error_ || !Has(key)) return;
    const auto value = GetInt(body_, key);
    if (!value.ok()) return Fail(key, std::string(Message(value.status())));
    if (**value < low || **value > high) {
      return Fail(key, fmt::format("'{}' must be between {} and {}, not {}", key, low, high, **value));
    }
    *out = static_cast<int32_t>(**value);
  }
  void Bool(const char* key, bool* out) {
    if (error_ || !Has(key)) return;
    const auto value = GetBool(body_, key);
    if (!value.ok()) return Fail(key, std::string(Message(value.status())));
    *out = **value;
  }
  void String(const char* key, size_t bytes_max, std::string* out) {
    if (error_ || !Has(key)) return;
    const auto value = GetString(body_, key);
    if (!value.ok()) return Fail(key, std::string(Message(value.status())));
    if ((*value)->size() > bytes_max) {
      return Fail(key,
                  fmt::format("'{}' has {} bytes; at most {} are taken", key, (*value)->size(), bytes_max));
    }
    *out = **value;
  }
  void TokenIds(const char* key, size_t count_max, int32_t num_tokens, std::vector<int32_t>* out) {
    if (error_ || !Has(key)) return;
    const Json& ids = body_[key];
    if (!ids.is_array() || ids.size() > count_max)
      return Fail(key, fmt::format("'{}' must be a list of at most {} token ids", key, count_max));
    for (const Json& id : ids) {
      if (!id.is_number_integer() || id < 0 || id >= num_tokens)
        return Fail(key, fmt::format("'{}' must hold token ids below {}", key, num_tokens));
      out->push_back(id.get<int32_t>());
    }
  }
  void Fail(std::string param, std::string message) {
    if (!error_) error_ = BadRequest(std::move(param), std::move(message));
  }
  const std::optional<ApiError>& error() const { return error_; }
  const Json& body() const { return body_; }

 private:
  const Json& body_;
  std::optional<ApiError> error_;
};

}  // namespace millrace::server
