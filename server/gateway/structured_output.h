#pragma once
// What a request holds its answer to: response_format, structured_outputs and its older names, forced tools.

#include <optional>
#include <string_view>

#include "server/gateway/api_request.h"

namespace millrace::server {

// Fills request->sampling.constraint from the body (its text, because schemas keep the order of their keys)
// and what `prompt` says of tools, and checks that it can be kept. Every error is a 400 that names the field.
// Pure.
std::optional<ApiError> ParseConstraint(std::string_view body, const RenderedPrompt& prompt,
                                        ApiRequest* request);

}  // namespace millrace::server
