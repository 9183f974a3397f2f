#pragma once
// The chat half of a request body: messages and tools, as OpenAI writes them, into the engine's ChatRequest.

#include "base/json.h"
#include "engine/tokenizer/chat_format.h"
#include "server/gateway/api_error.h"

namespace millrace::server {

// Validates messages, tools, tool_choice and chat_template_kwargs of `body` (an object). Content parts are
// joined, `developer` becomes `system`. Every error is a 400 that names the field. Pure.
ApiResult<engine::ChatRequest> ParseChatRequest(const OrderedJson& body);

}  // namespace millrace::server
