#pragma once
// Errors as OpenAI clients read them: {"error":{message,type,param,code}}, all four keys, string codes.

#include <optional>
#include <string>
#include <utility>

#include "base/status.h"

namespace millrace::server {

struct ApiError {
  int http_status = 500;
  std::string message;
  std::string type = "server_error";  // invalid_request_error, rate_limit_error, server_error ...
  std::optional<std::string> param;   // the field at fault, "messages[2].role"
  std::optional<std::string> code;    // model_not_found, context_length_exceeded, server_overloaded ...
  int32_t retry_after_seconds = 1;    // said with 429 and 503
};

// A 400 that names the field.
ApiError BadRequest(std::string param, std::string message);

// An error of the engine, the router or a worker, in the client's terms. The request was well-formed.
ApiError FromStatus(const Status& status);

std::string ErrorBody(const ApiError& error);

// Either a value or the error to answer with.
template <typename T>
class ApiResult {
 public:
  ApiResult(T value) : value_(std::move(value)) {}         // NOLINT: implicit, as in StatusOr
  ApiResult(ApiError error) : error_(std::move(error)) {}  // NOLINT: implicit, as in StatusOr
  bool ok() const { return value_.has_value(); }
  T& operator*() { return *value_; }
  T* operator->() { return &*value_; }
  const T& operator*() const { return *value_; }
  const T* operator->() const { return &*value_; }
  const ApiError& error() const { return *error_; }

 private:
  std::optional<T> value_;
  std::optional<ApiError> error_;
};

}  // namespace millrace::server
