#pragma once
// Ling's chat formats, v1 and v2, as code. They equal the Jinja templates that the checkpoints ship.

#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "base/json.h"
#include "base/status.h"

namespace millrace::engine {

struct ToolCall {
  std::string id;
  std::string name;
  OrderedJson arguments;  // an object, or a string that is inserted verbatim
};

struct ChatMessage {
  std::string role;  // system, user, assistant, tool
  std::string content;
  std::optional<std::string> reasoning_content;  // assistant only
  std::vector<ToolCall> tool_calls;              // assistant only
  std::string tool_call_id;                      // tool only; not rendered
};

struct ChatRequest {
  std::vector<ChatMessage> messages;
  std::vector<OrderedJson> tools;  // as the client gave them, keys in order
  bool add_generation_prompt = true;
  // Ling 2: the system turn ends "detailed thinking off" or "on". Unset: off, as the shipped template.
  bool thinking = false;
};

enum class ChatFormatKind { kLingV1, kLingV2 };

// Which format a checkpoint speaks: from tokenizer_config.json's chat_template (the v2 template names
// <|role_end|> / "detailed thinking"), else from `is_v2`.
StatusOr<ChatFormatKind> DetectChatFormat(const std::string& directory, bool is_v2);

// The prompt text. InvalidArgument names the message (`messages[3].role`...) that cannot be rendered. Pure.
StatusOr<std::string> RenderChat(ChatFormatKind kind, const ChatRequest& request);

// JSON as Python's json.dumps(ensure_ascii=False) writes it: ", " and ": " separators, keys in the given
// order.
std::string PythonJson(const OrderedJson& value);

}  // namespace millrace::engine
