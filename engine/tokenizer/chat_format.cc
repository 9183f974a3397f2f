#include "engine/tokenizer/chat_format.h"

#include <string_view>

#include "base/file.h"

namespace millrace::engine {
namespace {

constexpr std::string_view kThinkOpen = "<think>";
constexpr std::string_view kThinkClose = "</think>";
constexpr std::string_view kTurnEnd = "<|role_end|>";
constexpr std::string_view kGenerationPrompt = "<role>ASSISTANT</role>";

constexpr std::string_view kToolsBefore =
    "# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
    "You are provided with function signatures within <tools></tools> XML tags:\n<tools>";
constexpr std::string_view kToolsAfter =
    "\n</tools>\n\nFor each function call, return a json object with function name and arguments within "
    "<tool_call></tool_call> XML tags:\n<tool_call>\n"
    "{\"name\": <function-name>, \"arguments\": <args-json-object>}\n</tool_call>\n";

std::string_view TrimNewlinesLeft(std::string_view text) {
  const size_t first = text.find_first_not_of('\n');
  return first == std::string_view::npos ? std::string_view() : text.substr(first);
}

std::string_view TrimNewlinesRight(std::string_view text) {
  const size_t last = text.find_last_not_of('\n');
  return last == std::string_view::npos ? std::string_view() : text.substr(0, last + 1);
}

Status CheckMessages(ChatFormatKind kind, const ChatRequest& request) {
  if (request.messages.empty()) return InvalidArgument("messages: must not be empty");
  // The v1 format has no words for tools; a prompt that silently lacks them would mislead the caller.
  const bool has_tools = kind == ChatFormatKind::kLingV2;
  if (!has_tools && !request.tools.empty())
    return InvalidArgument("tools: this model's chat format has no tools");
  for (size_t i = 0; i < request.messages.size(); ++i) {
    const ChatMessage& message = request.messages[i];
    const std::string& role = message.role;
    if (role != "system" && role != "user" && role != "assistant" && role != "tool") {
      return InvalidArgument("messages[{}].role: '{}' is not one of system, user, assistant, tool", i, role);
    }
    if (!has_tools && !message.tool_calls.empty()) {
      return InvalidArgument("messages[{}].tool_calls: this model's chat format has no tools", i);
    }
  }
  return OkStatus();
}

std::string RenderV1(const ChatRequest& request) {
  std::string out;
  for (const ChatMessage& message : request.messages) {
    std::string_view name = "HUMAN";
    if (message.role == "system") name = "SYSTEM";
    if (message.role == "assistant") name = "ASSISTANT";
    if (message.role == "tool") name = "TOOL";
    out.append("<role>").append(name).append("</role>").append(message.content);
  }
  if (request.add_generation_prompt) out.append(kGenerationPrompt);
  return out;
}

// The opening system turn, which is there with or without a system message.
void AppendV2Head(const ChatRequest& request, std::string& out) {
  out.append("<role>SYSTEM</role>");
  if (request.messages[0].role == "system") out.append(request.messages[0].content).append("\n");
  if (!request.tools.empty()) {
    out.append(kToolsBefore);
    for (const OrderedJson& tool : request.tools) out.append("\n").append(PythonJson(tool));
    out.append(kToolsAfter);
  }
  out.append("detailed thinking ").append(request.thinking ? "on" : "off").append(kTurnEnd);
}

// Index of the last thing a person asked: user messages that only wrap a tool's answer do not count. The last
// message if there is none.
size_t LastQueryIndex(const std::vector<ChatMessage>& messages) {
  for (size_t i = messages.size(); i-- > 0;) {
    const std::string& content = messages[i].content;
    const bool is_tool_response =
        content.starts_with("<tool_response>") && content.ends_with("</tool_response>");
    if (messages[i].role == "user" && !is_tool_response) return i;
  }
  return messages.size() - 1;
}

void AppendToolCall(const ToolCall& call, std::string& out) {
  out.append("<tool_call>\n{\"name\": \"").append(call.name).append("\", \"arguments\": ");
  out.append(call.arguments.is_string() ? call.arguments.get_ref<const std::string&>()
                                        : PythonJson(call.arguments));
  out.append("}\n</tool_call>");
}

void AppendV2Assistant(const ChatMessage& message, bool is_after_query, std::string& out) {
  std::string_view content = message.content;
  std::string_view reasoning;
  if (message.reasoning_content) {
    reasoning = *message.reasoning_content;
  } else if (content.find(kThinkClose) != std::string_view::npos) {
    // Reasoning runs from the last opener before the first closer; the opener may be missing.
    reasoning = TrimNewlinesRight(content.substr(0, content.find(kThinkClose)));
    if (const size_t open = reasoning.rfind(kThinkOpen); open != std::string_view::npos) {
      reasoning.remove_prefix(open + kThinkOpen.size());
    }
    reasoning = TrimNewlinesLeft(reasoning);
    content = TrimNewlinesLeft(content.substr(content.rfind(kThinkClose) + kThinkClose.size()));
  }
  out.append("<role>ASSISTANT</role>");
  if (is_after_query && !reasoning.empty()) {
    out.append("\n<think>\n").append(TrimNewlinesLeft(TrimNewlinesRight(reasoning))).append("\n</think>\n\n");
    out.append(TrimNewlinesLeft(content));
  } else {
    out.append(content);
  }
  for (size_t i = 0; i < message.tool_calls.size(); ++i) {
    if (i > 0 || !content.empty()) out.append("\n");
    AppendToolCall(message.tool_calls[i], out);
  }
  out.append(kTurnEnd);
}

std::string RenderV2(const ChatRequest& request) {
  const auto& messages = request.messages;
  const size_t last_query = LastQueryIndex(messages);
  std::string out;
  AppendV2Head(request, out);
  for (size_t i = 0; i < messages.size(); ++i) {
    const ChatMessage& message = messages[i];
    if (message.role == "user") {
      out.append("<role>HUMAN</role>").append(message.content).append(kTurnEnd);
    } else if (message.role == "system") {
      if (i > 0) out.append("<role>SYSTEM</role>").append(message.content).append(kTurnEnd);
    } else if (message.role == "assistant") {
      AppendV2Assistant(message, i > last_query, out);
    } else {  // consecutive tool results share one turn
      if (i == 0 || messages[i - 1].role != "tool") out.append("<role>OBSERVATION</role>");
      out.append("\n<tool_response>\n").append(message.content).append("\n</tool_response>");
      if (i + 1 == messages.size() || messages[i + 1].role != "tool") out.append(kTurnEnd);
    }
  }
  if (request.add_generation_prompt) out.append(kGenerationPrompt);
  return out;
}

// The checkpoint's chat template; empty if it ships none. A list holds named templates, of which "default" is
// meant.
StatusOr<std::string> ReadTemplate(const std::string& directory) {
  if (auto file = ReadFile(directory + "/chat_template.jinja"); file.ok() || !absl::IsNotFound(file.status()))
    return file;
  const std::string path = directory + "/tokenizer_config.json";
  auto text = ReadFile(path);
  if (absl::IsNotFound(text.status())) return std::string();
  if (!text.ok()) return text.status();
  auto config = ParseJson(*text);
  if (!config.ok()) return Annotate(config.status(), path);
  if (!config->is_object()) return InvalidArgument("{}: must be a JSON object", path);
  const auto found = config->find("chat_template");
  if (found == config->end() || found->is_null()) return std::string();
  if (found->is_string()) return found->get<std::string>();
  for (const Json& named : *found) {
    auto name = GetString(named, "name");
    auto body = GetString(named, "template");
    if (name.ok() && body.ok() && *name == "default" && *body) return **body;
  }
  return InvalidArgument("{}: chat_template: must be a string or hold a template named \"default\"", path);
}

}  // namespace

StatusOr<ChatFormatKind> DetectChatFormat(const std::string& directory, bool is_v2) {
  MR_ASSIGN_OR_RETURN(const std::string chat_template, ReadTemplate(directory));
  if (chat_template.empty()) return is_v2 ? ChatFormatKind::kLingV2 : ChatFormatKind::kLingV1;
  const auto mentions = [&chat_template](const char* words) {
    return chat_template.find(words) != std::string::npos;
  };
  if (mentions("<|role_end|>") || mentions("detailed thinking")) return ChatFormatKind::kLingV2;
  // Base checkpoints of version 2 ship the version 1 template.
  if (mentions("<role>")) return ChatFormatKind::kLingV1;
  return Unimplemented("{}: the chat template is not one of Ling's", directory);
}

StatusOr<std::string> RenderChat(ChatFormatKind kind, const ChatRequest& request) {
  MR_RETURN_IF_ERROR(CheckMessages(kind, request));
  return kind == ChatFormatKind::kLingV1 ? RenderV1(request) : RenderV2(request);
}

}  // namespace millrace::engine
