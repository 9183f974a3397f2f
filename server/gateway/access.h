#pragma once
// Who may ask what on which listener, and which pages may ask from a browser. Pure but for the keys.

#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "server/gateway/gateway_context.h"
#include "server/gateway/http_connection.h"

namespace millrace::server {

enum class Listener { kPublic, kAdmin };

// What a route asks of its caller.
enum class Access {
  kOpen,      // anybody, on both listeners: health, the web page
  kClient,    // a key, on the public listener; not there on the admin listener
  kWatch,     // a key on the public listener, nothing on the admin listener
  kOperator,  // the admin listener; without one, a key on the public listener
};

// Whether the caller's key is good, from the values of its "authorization" and "x-api-key". On success *key
// gets the key's name, "" when this gateway asks for none.
std::optional<ApiError> CheckKey(const GatewayContext& context, std::string_view authorization,
                                 std::string_view plain, std::string* key);
// Default-deny: a path that is no route needs a key too. On success *key gets the name of the caller's key,
// "" without one.
std::optional<ApiError> CheckAccess(const GatewayContext& context, Listener listener, Access access,
                                    const HttpRequest& header, std::string* key);

// The CORS fields of an answer; empty when the request comes from no page, or from one that may not ask.
std::vector<std::pair<std::string, std::string>> CorsHeaders(const GatewayOptions& options,
                                                             const HttpRequest& header);
// A preflight request from a page that may ask: answered without a key.
bool IsPreflight(const GatewayOptions& options, const HttpRequest& header);

// An error of the edge itself.
ApiError EdgeError(int status, const char* code, std::string message);

}  // namespace millrace::server
