#include "server/gateway/responses.h"

#include <utility>

#include "base/random.h"

namespace millrace::server {
namespace {

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

std::unique_ptr<AnswerFormat> MakeResponsesFormat(const ApiRequest& request, const ModelInfo& model,
                                                  std::string_view body, int64_t created) {
  const auto parsed = ParseJson(body);
  return std::make_unique<ResponsesFormat>(request, model, parsed.ok() ? *parsed : Json::object(), created);
}

}  // namespace millrace::server
