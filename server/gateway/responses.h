#pragma once
// OpenAI's /v1/responses: the request becomes a chat request (responses_body.h), the answer a list of items.
// Nothing is stored.

#include <memory>
#include <string>
#include <string_view>

#include "base/json.h"
#include "server/gateway/answer_format.h"
#include "server/gateway/api_request.h"

namespace millrace::server {

// Writes the answer. `body` is the responses body, which is echoed; what it borrows outlives it.
std::unique_ptr<AnswerFormat> MakeResponsesFormat(const ApiRequest& request, const ModelInfo& model,
                                                  std::string_view body, int64_t created);

}  // namespace millrace::server
