#pragma once
// A body of /v1/responses as the chat request that it means.

#include <string_view>

#include "base/json.h"
#include "server/gateway/api_error.h"

namespace millrace::server {

// The chat body that a responses body means. Errors are 400s that name the field of the responses body.
// Fields that both have, and those that this endpoint does not know, are passed on as they are. Pure.
ApiResult<OrderedJson> ChatBodyOf(std::string_view responses_body);

// An error about that chat body, in the names of the responses body.
ApiError InNamesOfResponses(ApiError error);

}  // namespace millrace::server
