#include "server/gateway/responses.h"

#include <algorithm>
#include <utility>
#include <vector>

#include "base/random.h"

namespace millrace::server {
namespace {

bool Present(const OrderedJson& object, const char* key) {
  return object.contains(key) && !object[key].is_null();
}

// Fields that ask for what this server does not do, with the values that ask for nothing.
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
  if (!Present(body, "tools") || (body["tools"].is_array() && body["tools"].empty())) return std::nullopt;
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

class ResponsesFormat final : public AnswerFormat {
 public:
  ResponsesFormat(const ApiRequest& request, const ModelInfo& model, const Json& body, int64_t created)
      : response_(Envelope(request, model, body, created)) {}

  std::string Begin(const Usage& /*usage*/) override {
    // One after the other: they are numbered.
    std::string out = Frame("response.created", {{"response", response_}});
    return out + Frame("response.in_progress", {{"response", response_}});
  }

  std::string Delta(const ChoiceDelta& delta, const Usage& /*usage*/) override {
    std::string out;
    if (!delta.parts.reasoning.empty()) out += AddText("reasoning", delta.parts.reasoning);
    if (!delta.parts.content.empty()) out += AddText("message", delta.parts.content);
    for (const ToolCallDelta& piece : delta.parts.tool_calls) out += AddCall(piece);
    if (!delta.finish.empty()) {
      out += CloseItem();
      const bool cut = delta.finish == "length";
      response_["status"] = cut ? "incomplete" : "completed";
      if (cut) response_["incomplete_details"] = {{"reason", "max_output_tokens"}};
    }
    return out;
  }

  std::string End(const Usage& usage) override {
    SetUsage(usage);
    const bool cut = response_["status"] == "incomplete";
    return Frame(cut ? "response.incomplete" : "response.completed", {{"response", response_}});
  }

  std::string Failure(const ApiError& error) override {
    response_["status"] = "failed";
    response_["error"] = {{"code", error.code.value_or("server_error")}, {"message", error.message}};
    return Frame("response.failed", {{"response", response_}});
  }

  void Collect(const ChoiceDelta& delta) override { Delta(delta, {}); }
  std::string Whole(const Usage& usage) override {
    SetUsage(usage);
    return DumpJson(response_);
  }

 private:
  static Json Envelope(const ApiRequest& request, const ModelInfo& model, const Json& body, int64_t created) {
    const auto echo = [&](const char* key, Json absent) { return body.contains(key) ? body[key] : absent; };
    return {{"id", RandomName("resp_")},
            {"object", "response"},
            {"created_at", created},
            {"status", "in_progress"},
            {"background", false},
            {"error", nullptr},
            {"incomplete_details", nullptr},
            {"instructions", echo("instructions", nullptr)},
            {"max_output_tokens", echo("max_output_tokens", nullptr)},
            {"model", model.name},
            {"output", Json::array()},
            {"parallel_tool_calls", echo("parallel_tool_calls", true)},
            {"previous_response_id", nullptr},
            {"reasoning", echo("reasoning", {{"effort", nullptr}, {"summary", nullptr}})},
            {"store", false},
            {"temperature", request.sampling.temperature},
            {"text", echo("text", {{"format", {{"type", "text"}}}})},
            {"tool_choice", echo("tool_choice", "auto")},
            {"tools", echo("tools", Json::array())},
            {"top_p", request.sampling.top_p},
            {"truncation", "disabled"},
            {"usage", nullptr},
            {"metadata", echo("metadata", Json::object())}};
  }

  void SetUsage(const Usage& usage) {
    response_["usage"] = {{"input_tokens", usage.prompt_tokens},
                          {"input_tokens_details", {{"cached_tokens", usage.cached_tokens}}},
                          {"output_tokens", usage.completion_tokens},
                          {"output_tokens_details", {{"reasoning_tokens", usage.reasoning_tokens}}},
                          {"total_tokens", usage.prompt_tokens + usage.completion_tokens}};
  }

  std::string Frame(const char* type, Json event) {
    event["type"] = type;
    event["sequence_number"] = next_sequence_++;
    return fmt::format("event: {}\ndata: {}\n\n", type, DumpJson(event));
  }

  // The event of the item that is open, with its place.
  std::string ItemFrame(const char* type, Json event) {
    event["item_id"] = item_["id"];
    event["output_index"] = response_["output"].size();
    if (item_["type"] != "function_call") event["content_index"] = 0;
    return Frame(type, std::move(event));
  }

  static Json TextPart(bool reasoning, const std::string& text) {
    if (reasoning) return {{"type", "reasoning_text"}, {"text", text}};
    return {
        {"type", "output_text"}, {"text", text}, {"annotations", Json::array()}, {"logprobs", Json::array()}};
  }

  std::string OpenItem(Json item) {
    std::string out = CloseItem();
    item_ = std::move(item);
    text_.clear();
    return out + Frame("response.output_item.added",
                       {{"output_index", response_["output"].size()}, {"item", item_}});
  }

  std::string AddText(const char* type, const std::string& text) {
    std::string out;
    const bool reasoning = std::string_view(type) == "reasoning";
    if (item_.is_null() || item_["type"] != type) {
      Json item = {{"id", RandomName(reasoning ? "rs_" : "msg_")}, {"type", type}, {"status", "in_progress"}};
      item["content"] = Json::array();
      if (reasoning) {
        item["summary"] = Json::array();
      } else {
        item["role"] = "assistant";
      }
      out = OpenItem(std::move(item));
      out += ItemFrame("response.content_part.added", {{"part", TextPart(reasoning, "")}});
    }
    text_ += text;
    Json event = {{"delta", text}};
    if (!reasoning) event["logprobs"] = Json::array();
    return out + ItemFrame(reasoning ? "response.reasoning_text.delta" : "response.output_text.delta", event);
  }

  std::string AddCall(const ToolCallDelta& piece) {
    if (!piece.name.empty()) {
      return OpenItem({{"id", RandomName("fc_")},
                       {"type", "function_call"},
                       {"status", "in_progress"},
                       {"call_id", piece.id},
                       {"name", piece.name},
                       {"arguments", ""}});
    }
    text_ += piece.arguments;
    return ItemFrame("response.function_call_arguments.delta", {{"delta", piece.arguments}});
  }

  std::string CloseItem() {
    if (item_.is_null()) return "";
    std::string out;
    if (item_["type"] == "function_call") {
      item_["arguments"] = text_;
      out =
          ItemFrame("response.function_call_arguments.done", {{"arguments", text_}, {"name", item_["name"]}});
    } else {
      const bool reasoning = item_["type"] == "reasoning";
      Json done = {{"text", text_}};
      if (!reasoning) done["logprobs"] = Json::array();
      out = ItemFrame(reasoning ? "response.reasoning_text.done" : "response.output_text.done", done);
      item_["content"].push_back(TextPart(reasoning, text_));
      out += ItemFrame("response.content_part.done", {{"part", item_["content"][0]}});
    }
    item_["status"] = "completed";
    out +=
        Frame("response.output_item.done", {{"output_index", response_["output"].size()}, {"item", item_}});
    response_["output"].push_back(std::exchange(item_, nullptr));
    return out;
  }

  Json response_;
  Json item_;         // that is being written; null when none is
  std::string text_;  // of the item
  int64_t next_sequence_ = 0;
};

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
  static const std::pair<const char*, const char*> kSame[] = {
      {"model", "model"},
      {"temperature", "temperature"},
      {"top_p", "top_p"},
      {"stream", "stream"},
      {"max_output_tokens", "max_completion_tokens"},
      {"user", "user"},
      {"metadata", "metadata"},
      {"parallel_tool_calls", "parallel_tool_calls"},
      {"top_k", "top_k"},
      {"seed", "seed"},
      {"priority", "priority"},
      {"timeout", "timeout"},
      {"safety_identifier", "safety_identifier"},
      {"prompt_cache_key", "prompt_cache_key"},
      {"ignore_eos", "ignore_eos"},
      {"min_p", "min_p"},
      {"chat_template_kwargs", "chat_template_kwargs"}};
  for (const auto& [from, to] : kSame) {
    if (Present(body, from)) chat[to] = body[from];
  }
  if (Present(body, "reasoning")) {
    if (!body["reasoning"].is_object()) return BadRequest("reasoning", "'reasoning' must be an object");
    if (Present(body["reasoning"], "effort")) chat["reasoning_effort"] = body["reasoning"]["effort"];
  }
  if (auto error = AddTools(body, &chat)) return *error;
  if (auto error = AddFormat(body, &chat)) return *error;
  return chat;
}

std::unique_ptr<AnswerFormat> MakeResponsesFormat(const ApiRequest& request, const ModelInfo& model,
                                                  std::string_view body, int64_t created) {
  const auto parsed = ParseJson(body);
  return std::make_unique<ResponsesFormat>(request, model, parsed.ok() ? *parsed : Json::object(), created);
}

}  // namespace millrace::server
