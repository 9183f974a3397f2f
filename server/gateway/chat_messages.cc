#include "server/gateway/chat_messages.h"

#include <set>

namespace millrace::server {
namespace {

constexpr size_t kMessagesMax = 4096;
constexpr size_t kToolsMax = 128;

bool Present(const OrderedJson& object, const char* key) {
  return object.contains(key) && !object[key].is_null();
}

// A string, null, or a list of {"type":"text","text":...} parts.
ApiResult<std::string> ParseContent(const OrderedJson& content, const std::string& param) {
  if (content.is_null()) return std::string();
  if (content.is_string()) return content.get<std::string>();
  if (!content.is_array())
    return BadRequest(param, fmt::format("'{}' must be a string or a list of parts", param));
  std::string text;
  for (size_t i = 0; i < content.size(); ++i) {
    const OrderedJson& part = content[i];
    const std::string part_param = fmt::format("{}[{}]", param, i);
    if (!part.is_object() || !part.contains("type") || !part["type"].is_string()) {
      return BadRequest(part_param, fmt::format("'{}' must be an object with a 'type'", part_param));
    }
    if (part["type"] != "text") {
      return BadRequest(part_param + ".type", fmt::format("'{}.type' is '{}'; this model takes only 'text'",
                                                          part_param, part["type"].get<std::string>()));
    }
    if (!part.contains("text") || !part["text"].is_string()) {
      return BadRequest(part_param + ".text", fmt::format("'{}.text' must be a string", part_param));
    }
    text += part["text"].get_ref<const std::string&>();
  }
  return text;
}

ApiResult<std::vector<engine::ToolCall>> ParseToolCalls(const OrderedJson& calls, const std::string& param) {
  std::vector<engine::ToolCall> parsed;
  if (!calls.is_array() || calls.empty())
    return BadRequest(param, fmt::format("'{}' must be a list with entries", param));
  for (size_t i = 0; i < calls.size(); ++i) {
    const std::string at = fmt::format("{}[{}]", param, i);
    const OrderedJson& call = calls[i];
    if (!call.is_object() || !call.contains("function") || !call["function"].is_object()) {
      return BadRequest(at, fmt::format("'{}' must be an object with a 'function'", at));
    }
    const OrderedJson& function = call["function"];
    if (!function.contains("name") || !function["name"].is_string()) {
      return BadRequest(at + ".function.name", fmt::format("'{}.function.name' must be a string", at));
    }
    engine::ToolCall out;
    out.name = function["name"].get<std::string>();
    if (call.contains("id") && call["id"].is_string()) out.id = call["id"].get<std::string>();
    out.arguments = OrderedJson::object();
    if (Present(function, "arguments")) {
      if (!function["arguments"].is_string() && !function["arguments"].is_object()) {
        return BadRequest(at + ".function.arguments",
                          fmt::format("'{}.function.arguments' must be a string or an object", at));
      }
      out.arguments = function["arguments"];
    }
    parsed.push_back(std::move(out));
  }
  return parsed;
}

ApiResult<engine::ChatMessage> ParseMessage(const OrderedJson& message, const std::string& param) {
  if (!message.is_object()) return BadRequest(param, fmt::format("'{}' must be an object", param));
  if (!message.contains("role") || !message["role"].is_string()) {
    return BadRequest(param + ".role", fmt::format("'{}.role' must be a string", param));
  }
  engine::ChatMessage out;
  out.role = message["role"].get<std::string>();
  if (out.role == "developer") out.role = "system";
  static const std::set<std::string> roles = {"system", "user", "assistant", "tool"};
  if (!roles.contains(out.role)) {
    return BadRequest(param + ".role",
                      fmt::format("'{}.role' is '{}'; it must be system, developer, user, assistant "
                                  "or tool",
                                  param, out.role));
  }
  if (out.role != "assistant" && !Present(message, "content")) {
    return BadRequest(param + ".content",
                      fmt::format("'{}.content' is required for role '{}'", param, out.role));
  }
  if (message.contains("content")) {
    auto content = ParseContent(message["content"], param + ".content");
    if (!content.ok()) return content.error();
    out.content = std::move(*content);
  }
  if (out.role == "assistant") {
    for (const char* key : {"reasoning_content", "reasoning"}) {
      if (!Present(message, key)) continue;
      if (!message[key].is_string())
        return BadRequest(param + "." + key, fmt::format("'{}.{}' must be a string", param, key));
      out.reasoning_content = message[key].get<std::string>();
    }
    if (Present(message, "tool_calls")) {
      auto calls = ParseToolCalls(message["tool_calls"], param + ".tool_calls");
      if (!calls.ok()) return calls.error();
      out.tool_calls = std::move(*calls);
    }
  }
  if (Present(message, "tool_call_id") && message["tool_call_id"].is_string()) {
    out.tool_call_id = message["tool_call_id"].get<std::string>();
  }
  return out;
}

std::optional<ApiError> ParseTools(const OrderedJson& body, engine::ChatRequest* chat) {
  if (!Present(body, "tools")) {
    if (Present(body, "tool_choice") && body["tool_choice"] != "none" && body["tool_choice"] != "auto") {
      return BadRequest("tool_choice", "'tool_choice' needs 'tools'");
    }
    return std::nullopt;
  }
  const OrderedJson& tools = body["tools"];
  if (!tools.is_array() || tools.empty() || tools.size() > kToolsMax) {
    return BadRequest("tools", fmt::format("'tools' must be a list of 1 to {} tools", kToolsMax));
  }
  for (size_t i = 0; i < tools.size(); ++i) {
    const OrderedJson& tool = tools[i];
    const std::string at = fmt::format("tools[{}]", i);
    if (!tool.is_object() || tool.value("type", OrderedJson()) != "function" || !tool.contains("function") ||
        !tool["function"].is_object() || !tool["function"].contains("name") ||
        !tool["function"]["name"].is_string()) {
      return BadRequest(
          at, fmt::format("'{}' must be {{\"type\":\"function\",\"function\":{{\"name\":...}}}}", at));
    }
    chat->tools.push_back(tool);
  }
  if (!Present(body, "tool_choice") || body["tool_choice"] == "auto") return std::nullopt;
  if (body["tool_choice"] == "none") {
    chat->tools.clear();
    return std::nullopt;
  }
  return BadRequest("tool_choice",
                    "'tool_choice' must be 'auto' or 'none': forcing a tool is not supported by this server");
}

std::optional<ApiError> ParseTemplateOptions(const OrderedJson& body, engine::ChatRequest* chat) {
  if (Present(body, "add_generation_prompt")) {
    if (!body["add_generation_prompt"].is_boolean()) {
      return BadRequest("add_generation_prompt", "'add_generation_prompt' must be true or false");
    }
    chat->add_generation_prompt = body["add_generation_prompt"].get<bool>();
  }
  if (Present(body, "reasoning_effort")) {
    if (!body["reasoning_effort"].is_string())
      return BadRequest("reasoning_effort", "'reasoning_effort' must be a string");
    chat->thinking = body["reasoning_effort"] != "none";
  }
  if (!Present(body, "chat_template_kwargs")) return std::nullopt;
  const OrderedJson& options = body["chat_template_kwargs"];
  if (!options.is_object())
    return BadRequest("chat_template_kwargs", "'chat_template_kwargs' must be an object");
  for (const auto& [key, value] : options.items()) {
    const std::string param = "chat_template_kwargs." + key;
    if (key != "enable_thinking")
      return BadRequest(param, fmt::format("'{}': this template knows only enable_thinking", param));
    if (!value.is_boolean()) return BadRequest(param, fmt::format("'{}' must be true or false", param));
    chat->thinking = value.get<bool>();
  }
  return std::nullopt;
}

}  // namespace

ApiResult<engine::ChatRequest> ParseChatRequest(const OrderedJson& body) {
  engine::ChatRequest chat;
  if (!Present(body, "messages")) return BadRequest("messages", "'messages' is required");
  const OrderedJson& messages = body["messages"];
  if (!messages.is_array() || messages.empty() || messages.size() > kMessagesMax) {
    return BadRequest("messages", fmt::format("'messages' must be a list of 1 to {} messages", kMessagesMax));
  }
  for (size_t i = 0; i < messages.size(); ++i) {
    auto message = ParseMessage(messages[i], fmt::format("messages[{}]", i));
    if (!message.ok()) return message.error();
    chat.messages.push_back(std::move(*message));
  }
  const size_t count = chat.messages.size();
  if (count >= 2 && chat.messages[count - 1].role == "assistant" &&
      chat.messages[count - 2].role == "assistant") {
    return BadRequest("messages", "the last two messages are both from the assistant");
  }
  if (auto error = ParseTools(body, &chat)) return *error;
  if (auto error = ParseTemplateOptions(body, &chat)) return *error;
  return chat;
}

}  // namespace millrace::server
