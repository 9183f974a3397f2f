#include "server/gateway/access.h"

#include <absl/strings/match.h>

#include <algorithm>
#include <boost/beast/http.hpp>

namespace millrace::server {
namespace {

namespace http = boost::beast::http;

constexpr std::string_view kBearer = "bearer ";

std::string_view KeyOf(std::string_view authorization, std::string_view plain) {
  const bool bearer =
      authorization.size() > kBearer.size() &&
      absl::EqualsIgnoreCase({authorization.data(), kBearer.size()}, {kBearer.data(), kBearer.size()});
  return bearer ? authorization.substr(kBearer.size()) : plain;
}

std::string_view FieldOf(const HttpRequest& header, const char* name) {
  const auto value = header[name];
  return {value.data(), value.size()};
}

bool OriginAllowed(const GatewayOptions& options, const HttpRequest& header) {
  const auto value = header[http::field::origin];
  const std::string origin(value.data(), value.size());
  return !origin.empty() &&
         std::any_of(options.cors_origins.begin(), options.cors_origins.end(),
                     [&](const std::string& allowed) { return allowed == "*" || allowed == origin; });
}

}  // namespace

ApiError EdgeError(int status, const char* code, std::string message) {
  ApiError error;
  error.http_status = status;
  error.type = status == 401 ? "authentication_error" : "invalid_request_error";
  error.code = code;
  error.message = std::move(message);
  return error;
}

std::optional<ApiError> CheckKey(const GatewayContext& context, std::string_view authorization,
                                 std::string_view plain, std::string* key) {
  if (context.keys == nullptr) return std::nullopt;
  const std::string_view given = KeyOf(authorization, plain);
  if (given.empty())
    return EdgeError(401, "invalid_api_key", "an API key is needed: 'Authorization: Bearer KEY'");
  const auto name = context.keys->Find(given);
  if (!name) return EdgeError(401, "invalid_api_key", "the API key is not valid");
  *key = *name;
  return std::nullopt;
}

std::optional<ApiError> CheckAccess(const GatewayContext& context, Listener listener, Access access,
                                    const HttpRequest& header, std::string* key) {
  if (access == Access::kOpen) return std::nullopt;
  const ApiError nothing = EdgeError(404, "not_found", "there is nothing at this address");
  if (listener == Listener::kAdmin) {
    if (access == Access::kClient) return nothing;
    return std::nullopt;
  }
  if (auto refused = CheckKey(context, FieldOf(header, "authorization"), FieldOf(header, "x-api-key"), key))
    return refused;
  if (access == Access::kOperator && !context.options.admin_listen.empty()) return nothing;
  return std::nullopt;
}

std::vector<std::pair<std::string, std::string>> CorsHeaders(const GatewayOptions& options,
                                                             const HttpRequest& header) {
  if (!OriginAllowed(options, header)) return {};
  const auto origin = header[http::field::origin];
  return {{"access-control-allow-origin", std::string(origin.data(), origin.size())},
          {"vary", "origin"},
          {"access-control-expose-headers", "x-request-id, retry-after"},
          {"access-control-allow-methods", "GET, POST, OPTIONS"},
          {"access-control-allow-headers", "authorization, content-type, x-api-key, x-request-id"},
          {"access-control-max-age", "600"}};
}

bool IsPreflight(const GatewayOptions& options, const HttpRequest& header) {
  return header.method() == http::verb::options && OriginAllowed(options, header);
}

}  // namespace millrace::server
