#pragma once
// The chat half of a request body: messages and tools, as OpenAI writes them, into the engine's ChatRequest.

#include "base/json.h"
#include "engine/tokenizer/chat_format.h"
#include "server/gateway/api_error.h"

namespace millrace::server {

struct ParsedChat {
  engine::ChatRequest chat;         // without tools when tool_choice is none
  bool parallel_tool_calls = true;  // false: the answer ends after one call
  bool continue_final_message = false;
  // Calls that must come: the tools that may be called, as {"name","parameters"}; empty: the model decides.
  std::vector<OrderedJson> required_tools;
  bool named_tool = false;  // it is called once
};

// Validates messages, tools, tool_choice and chat_template_kwargs of `body` (an object). Content parts are
// joined, `developer` becomes `system`. Every error is a 400 that names the field. Pure.
ApiResult<ParsedChat> ParseChatRequest(const OrderedJson& body);

}  // namespace millrace::server
