#include "server/gateway/responses_body.h"

#include <algorithm>
#include <iterator>
#include <set>
#include <string>
#include <utility>

namespace millrace::server {
namespace {

bool Present(const OrderedJson& object, const char* key) {
  return object.contains(key) && !object[key].is_null();
}

// Fields that ask for what this server, or this endpoint, does not do, with the values that ask for nothing.
struct Refusal {
  const char* field;
  const char* accepted;
  const char* reason;
};
constexpr Refusal kRefused[] = {
    {"previous_response_id", "[]", "this server stores no answers; send the conversation in 'input'"},
    {"conversation", "[]", "this server stores no conversations; send it in 'input'"},
    {"prompt", "[]", "stored prompts are not supported by this server"},
    {"background", "[false]", "background answers are not supported by this server"},
    {"store", "[false]", "this server stores no answers"},
    {"truncation", R"(["disabled"])", "only 'disabled' is supported: a prompt that is too long is refused"},
    {"include", "[[]]", "there is nothing more to include"},
    {"max_tool_calls", "[]", "there are no built-in tools to limit"},
    {"service_tier", R"(["auto","default"])", "this server has one service tier"},
    {"messages", "[]", "'messages' is a field of /v1/chat/completions; use 'input'"},
    {"n", "[1]", "this endpoint gives one answer; use /v1/chat/completions"},
    {"logprobs", "[false]", "this endpoint gives no log-probabilities; use /v1/chat/completions"},
    {"top_logprobs", "[0]", "this endpoint gives no log-probabilities; use /v1/chat/completions"},
    {"return_token_ids", "[false]", "this endpoint gives no token ids; use /v1/chat/completions"},
};

// Text of a message's content: a string, or parts of input_text and output_text.
ApiResult<std::string> TextOf(const OrderedJson& content, const std::string& param) {
  if (content.is_string()) return content.get<std::string>();
  if (!content.is_array())
    return BadRequest(param, fmt::format("'{}' must be a string or a list of parts", param));
  std::string text;
  for (size_t i = 0; i < content.size(); ++i) {
    const OrderedJson& part = content[i];
    const bool typed = part.is_object() && part.contains("type") && part["type"].is_string();
    const std::string type = typed ? part["type"].get<std::string>() : std::string();
    const bool known =
        type == "input_text" || type == "output_text" || type == "text" || type == "reasoning_text";
    if (!known || !part.contains("text") || !part["text"].is_string())
      return BadRequest(fmt::format("{}[{}]", param, i),
                        fmt::format("'{}[{}]' must be a text part", param, i));
    text += part["text"].get_ref<const std::string&>();
  }
  return text;
}

std::optional<ApiError> AddItem(const OrderedJson& item, const std::string& param, OrderedJson* messages) {
  if (!item.is_object()) return BadRequest(param, fmt::format("'{}' must be an object", param));
  for (const char* key : {"type", "call_id", "name", "arguments", "role"}) {
    if (Present(item, key) && !item[key].is_string())
      return BadRequest(param + "." + key, fmt::format("'{}.{}' must be a string", param, key));
  }
  const std::string type = Present(item, "type") ? item["type"].get<std::string>() : "message";
  if (type == "message") {
    if (!Present(item, "role"))
      return BadRequest(param + ".role", fmt::format("'{}.role' is required", param));
    auto text = TextOf(Present(item, "content") ? item["content"] : OrderedJson(), param + ".content");
    if (!text.ok()) return text.error();
    messages->push_back({{"role", item["role"]}, {"content", *text}});
  } else if (type == "function_call") {
    for (const char* key : {"call_id", "name", "arguments"}) {
      if (!Present(item, key))
        return BadRequest(param + "." + key, fmt::format("'{}.{}' is required", param, key));
    }
    const OrderedJson call = {{"id", item["call_id"]},
                              {"type", "function"},
                              {"function", {{"name", item["name"]}, {"arguments", item["arguments"]}}}};
    // Calls that follow each other, or a message of the assistant, are one turn.
    const bool joins = !messages->empty() && messages->back()["role"] == "assistant";
    if (!joins) messages->push_back({{"role", "assistant"}, {"content", nullptr}});
    OrderedJson& turn = messages->back();
    if (!turn.contains("tool_calls")) turn["tool_calls"] = OrderedJson::array();
    turn["tool_calls"].push_back(call);
  } else if (type == "function_call_output") {
    auto text = TextOf(Present(item, "output") ? item["output"] : OrderedJson(), param + ".output");
    if (!text.ok()) return text.error();
    OrderedJson message = {{"role", "tool"}, {"content", *text}};
    if (Present(item, "call_id")) message["tool_call_id"] = item["call_id"];
    messages->push_back(std::move(message));
  } else if (type != "reasoning") {  // what the model thought is not shown to it again
    return BadRequest(param + ".type",
                      fmt::format("items of type '{}' are not supported by this server", type));
  }
  return std::nullopt;
}

std::optional<ApiError> AddTools(const OrderedJson& body, OrderedJson* chat) {
  if (!Present(body, "tools") || (body["tools"].is_array() && body["tools"].empty())) {
    // A call that is asked for cannot come: the chat request is refused for it.
    if (Present(body, "tool_choice") && body["tool_choice"] != "auto" && body["tool_choice"] != "none")
      (*chat)["tool_choice"] = body["tool_choice"];
    return std::nullopt;
  }
  if (!body["tools"].is_array()) return BadRequest("tools", "'tools' must be a list");
  (*chat)["tools"] = OrderedJson::array();
  for (size_t i = 0; i < body["tools"].size(); ++i) {
    const OrderedJson& tool = body["tools"][i];
    if (!tool.is_object() || tool.value("type", OrderedJson()) != "function" || !tool.contains("name"))
      return BadRequest(fmt::format("tools[{}]", i),
                        "only tools of type 'function', with a name, are supported");
    OrderedJson function = {{"name", tool["name"]}};
    for (const char* key : {"description", "parameters"}) {
      if (Present(tool, key)) function[key] = tool[key];
    }
    (*chat)["tools"].push_back({{"type", "function"}, {"function", std::move(function)}});
  }
  if (Present(body, "tool_choice")) {
    const OrderedJson& choice = body["tool_choice"];
    (*chat)["tool_choice"] = choice.is_object() && choice.contains("name")
                                 ? OrderedJson{{"type", "function"}, {"function", {{"name", choice["name"]}}}}
                                 : choice;
  }
  return std::nullopt;
}

std::optional<ApiError> AddFormat(const OrderedJson& body, OrderedJson* chat) {
  if (!Present(body, "text")) return std::nullopt;
  if (!body["text"].is_object()) return BadRequest("text", "'text' must be an object");
  if (Present(body["text"], "verbosity")) (*chat)["verbosity"] = body["text"]["verbosity"];
  if (!Present(body["text"], "format")) return std::nullopt;
  const OrderedJson& format = body["text"]["format"];
  if (!format.is_object()) return BadRequest("text.format", "'text.format' must be an object");
  if (format.value("type", OrderedJson()) != "json_schema") {
    (*chat)["response_format"] = format;
    return std::nullopt;
  }
  OrderedJson schema = format;
  schema.erase("type");
  (*chat)["response_format"] = {{"type", "json_schema"}, {"json_schema", std::move(schema)}};
  return std::nullopt;
}

}  // namespace

ApiResult<OrderedJson> ChatBodyOf(std::string_view text) {
  const auto parsed = ParseOrderedJson(text);
  if (!parsed.ok()) return BadRequest("", std::string(Message(parsed.status())));
  const OrderedJson& body = *parsed;
  if (!body.is_object()) return BadRequest("", "the request body must be a JSON object");
  for (const Refusal& refusal : kRefused) {
    if (!Present(body, refusal.field)) continue;
    const auto accepted = ParseOrderedJson(refusal.accepted);
    if (std::find(accepted->begin(), accepted->end(), body[refusal.field]) == accepted->end())
      return BadRequest(refusal.field, refusal.reason);
  }
  OrderedJson messages = OrderedJson::array();
  if (Present(body, "instructions")) {
    if (!body["instructions"].is_string())
      return BadRequest("instructions", "'instructions' must be a string");
    messages.push_back({{"role", "system"}, {"content", body["instructions"]}});
  }
  if (!Present(body, "input")) return BadRequest("input", "'input' is required");
  if (body["input"].is_string()) {
    messages.push_back({{"role", "user"}, {"content", body["input"]}});
  } else if (body["input"].is_array() && !body["input"].empty()) {
    for (size_t i = 0; i < body["input"].size(); ++i) {
      if (auto error = AddItem(body["input"][i], fmt::format("input[{}]", i), &messages)) return *error;
    }
  } else {
    return BadRequest("input", "'input' must be a string or a list of items");
  }
  OrderedJson chat = {{"messages", std::move(messages)}};
  // What has the same name there is honoured, refused or logged there.
  static const std::set<std::string> kOwn = {"input",       "instructions", "reasoning",        "tools",
                                             "tool_choice", "text",         "max_output_tokens"};
  for (const auto& item : body.items()) {
    const std::string& key = item.key();
    const bool refused = std::any_of(std::begin(kRefused), std::end(kRefused),
                                     [&](const Refusal& refusal) { return key == refusal.field; });
    if (!refused && !kOwn.contains(key) && !item.value().is_null()) chat[key] = item.value();
  }
  if (Present(body, "max_output_tokens")) chat["max_completion_tokens"] = body["max_output_tokens"];
  if (Present(body, "reasoning")) {
    if (!body["reasoning"].is_object()) return BadRequest("reasoning", "'reasoning' must be an object");
    if (Present(body["reasoning"], "effort")) chat["reasoning_effort"] = body["reasoning"]["effort"];
  }
  if (auto error = AddTools(body, &chat)) return *error;
  if (auto error = AddFormat(body, &chat)) return *error;
  return chat;
}

ApiError InNamesOfResponses(ApiError error) {
  static constexpr std::pair<std::string_view, std::string_view> kNames[] = {
      {"max_completion_tokens", "max_output_tokens"},
      {"messages", "input"},
      {"reasoning_effort", "reasoning.effort"},
      {"response_format", "text.format"}};
  for (const auto& [chat, ours] : kNames) {
    if (error.param.has_value() && error.param->starts_with(chat)) error.param->replace(0, chat.size(), ours);
    for (size_t at = error.message.find(chat); at != std::string::npos;
         at = error.message.find(chat, at + ours.size()))
      error.message.replace(at, chat.size(), ours);
  }
  return error;
}

}  // namespace millrace::server
