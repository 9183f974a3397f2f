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

// Which tools must be called: all of them for "required", one for a name.
std::optional<ApiError> ParseToolChoice(const OrderedJson& choice, ParsedChat* parsed) {
  if (choice == "auto") return std::nullopt;
  if (choice == "none") {
    parsed->chat.tools.clear();
    return std::nullopt;
  }
  std::string wanted;
  if (choice.is_object()) {
    const auto function = choice.find("function");
    const bool named = choice.value("type", OrderedJson()) == "function" && function != choice.end() &&
                       function->is_object() && function->contains("name") && (*function)["name"].is_string();
    if (!named) {
      return BadRequest("tool_choice",
                        "'tool_choice' must be {\"type\":\"function\",\"function\":{\"name\":...}}");
    }
    wanted = (*function)["name"].get<std::string>();
    parsed->named_tool = true;
  } else if (choice != "required") {
    return BadRequest("tool_choice", "'tool_choice' must be 'auto', 'none', 'required' or name a function");
  }
  for (const OrderedJson& tool : parsed->chat.tools) {
    const OrderedJson& function = tool["function"];
    if (!wanted.empty() && function["name"] != wanted) continue;
    OrderedJson required = {{"name", function["name"]}};
    if (function.contains("parameters")) required["parameters"] = function["parameters"];
    parsed->required_tools.push_back(std::move(required));
  }
  if (parsed->required_tools.empty())
    return BadRequest("tool_choice",
                      fmt::format("'tool_choice' names '{}', which is not among 'tools'", wanted));
  return std::nullopt;
}

std::optional<ApiError> ParseTools(const OrderedJson& body, ParsedChat* parsed) {
  if (!Present(body, "tools")) {
    if (Present(body, "tool_choice") && body["tool_choice"] != "none" && body["tool_choice"] != "auto")
      return BadRequest("tool_choice", "'tool_choice' needs 'tools'");
    return std::nullopt;
  }
  const OrderedJson& tools = body["tools"];
  if (!tools.is_array() || tools.empty() || tools.size() > kToolsMax)
    return BadRequest("tools", fmt::format("'tools' must be a list of 1 to {} tools", kToolsMax));
  for (size_t i = 0; i < tools.size(); ++i) {
    const OrderedJson& tool = tools[i];
    const std::string at = fmt::format("tools[{}]", i);
    if (!tool.is_object() || tool.value("type", OrderedJson()) != "function" || !tool.contains("function") ||
        !tool["function"].is_object() || !tool["function"].contains("name") ||
        !tool["function"]["name"].is_string()) {
      return BadRequest(
          at, fmt::format("'{}' must be {{\"type\":\"function\",\"function\":{{\"name\":...}}}}", at));
    }
    parsed->chat.tools.push_back(tool);
  }
  return Present(body, "tool_choice") ? ParseToolChoice(body["tool_choice"], parsed) : std::nullopt;
}

std::optional<ApiError> ReadBool(const OrderedJson& body, const char* key, bool* out) {
  if (!Present(body, key)) return std::nullopt;
  if (!body[key].is_boolean()) return BadRequest(key, fmt::format("'{}' must be true or false", key));
  *out = body[key].get<bool>();
  return std::nullopt;
}

std::optional<ApiError> ParseTemplateOptions(const OrderedJson& body, ParsedChat* parsed) {
  engine::ChatRequest* const chat = &parsed->chat;
  if (auto error = ReadBool(body, "parallel_tool_calls", &parsed->parallel_tool_calls)) return error;
  if (auto error = ReadBool(body, "add_generation_prompt", &chat->add_generation_prompt)) return error;
  if (auto error = ReadBool(body, "continue_final_message", &parsed->continue_final_message)) return error;
  if (parsed->continue_final_message) {
    if (Present(body, "add_generation_prompt") && chat->add_generation_prompt) {
      return BadRequest("continue_final_message",
                        "'continue_final_message' and 'add_generation_prompt' exclude each other");
    }
    if (chat->messages.back().role != "assistant" || !chat->messages.back().tool_calls.empty()) {
      return BadRequest(
          "continue_final_message",
          "'continue_final_message' needs a last message from the assistant, without tool calls");
    }
    chat->add_generation_prompt = false;
  }
  if (Present(body, "reasoning_effort")) {
    static const std::set<std::string> efforts = {"none", "minimal", "low", "medium", "high", "xhigh"};
    if (!body["reasoning_effort"].is_string() ||
        !efforts.contains(body["reasoning_effort"].get_ref<const std::string&>())) {
      return BadRequest("reasoning_effort",
                        "'reasoning_effort' must be none, minimal, low, medium, high or xhigh");
    }
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

ApiResult<ParsedChat> ParseChatRequest(const OrderedJson& body) {
  ParsedChat parsed;
  engine::ChatRequest& chat = parsed.chat;
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
  if (auto error = ParseTools(body, &parsed)) return *error;
  if (auto error = ParseTemplateOptions(body, &parsed)) return *error;
  return parsed;
}

}  // namespace millrace::server
