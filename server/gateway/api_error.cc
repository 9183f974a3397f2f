#include "server/gateway/api_error.h"

#include "base/json.h"

namespace millrace::server {

ApiError BadRequest(std::string param, std::string message) {
  ApiError error;
  error.http_status = 400;
  error.message = std::move(message);
  error.type = "invalid_request_error";
  if (!param.empty()) error.param = std::move(param);
  error.code = "invalid_value";
  return error;
}

ApiError FromStatus(const Status& status) {
  ApiError error;
  error.message = std::string(Message(status));
  switch (status.code()) {
    case absl::StatusCode::kInvalidArgument:
    case absl::StatusCode::kOutOfRange:
      error.http_status = 400;
      error.type = "invalid_request_error";
      error.code = "invalid_value";
      break;
    case absl::StatusCode::kResourceExhausted:
      error.http_status = 429;
      error.type = "rate_limit_error";
      error.code = "server_overloaded";
      break;
    case absl::StatusCode::kDeadlineExceeded:
      error.http_status = 504;
      error.type = "timeout_error";
      error.code = "deadline_exceeded";
      break;
    case absl::StatusCode::kUnavailable:
    case absl::StatusCode::kFailedPrecondition:
      error.http_status = 503;
      error.code = "service_unavailable";
      break;
    default:
      error.http_status = 500;
      error.code = "engine_error";
  }
  return error;
}

std::string ErrorBody(const ApiError& error) {
  Json body;
  body["message"] = error.message;
  body["type"] = error.type;
  body["param"] = error.param ? Json(*error.param) : Json(nullptr);
  body["code"] = error.code ? Json(*error.code) : Json(nullptr);
  return DumpJson(Json{{"error", body}});
}

}  // namespace millrace::server
