#include "server/gateway/chat_proto.h"

#include <cmath>
#include <utility>

namespace millrace::server {
namespace {

using google::protobuf::FieldDescriptor;

// The `optional` scalars under their own names: the fields that are the same in both APIs.
std::optional<ApiError> CopyScalars(const v1::CompleteRequest& request, OrderedJson* body) {
  const google::protobuf::Reflection& reflection = *request.GetReflection();
  std::vector<const FieldDescriptor*> present;
  reflection.ListFields(request, &present);
  for (const FieldDescriptor* field : present) {
    if (field->is_repeated() || field->real_containing_oneof() != nullptr) continue;
    OrderedJson& value = (*body)[field->name()];
    switch (field->cpp_type()) {
      case FieldDescriptor::CPPTYPE_INT32:
        value = reflection.GetInt32(request, field);
        break;
      case FieldDescriptor::CPPTYPE_UINT64:
        value = reflection.GetUInt64(request, field);
        break;
      case FieldDescriptor::CPPTYPE_DOUBLE:
        value = reflection.GetDouble(request, field);
        if (!std::isfinite(value.get<double>()))  // JSON has none of these
          return BadRequest(field->name(), fmt::format("'{}' must be a number", field->name()));
        break;
      case FieldDescriptor::CPPTYPE_BOOL:
        value = reflection.GetBool(request, field);
        break;
      case FieldDescriptor::CPPTYPE_STRING:
        value = reflection.GetString(request, field);
        break;
      default:  // messages have their own functions
        body->erase(field->name());
    }
  }
  return std::nullopt;
}

OrderedJson MessageJson(const v1::Message& message) {
  OrderedJson json = {{"role", message.role()}, {"content", message.content()}};
  if (!message.reasoning_content().empty()) json["reasoning_content"] = message.reasoning_content();
  if (!message.tool_call_id().empty()) json["tool_call_id"] = message.tool_call_id();
  for (const v1::ToolCall& call : message.tool_calls()) {
    json["tool_calls"].push_back({{"id", call.id()},
                                  {"type", "function"},
                                  {"function", {{"name", call.name()}, {"arguments", call.arguments()}}}});
  }
  return json;
}

ApiResult<OrderedJson> ParseText(const std::string& text, const std::string& param) {
  auto parsed = ParseOrderedJson(text);
  if (!parsed.ok()) return BadRequest(param, std::string(Message(parsed.status())));
  return *std::move(parsed);
}

std::optional<ApiError> CopyTools(const v1::CompleteRequest& request, OrderedJson* body) {
  for (int i = 0; i < request.tools_size(); ++i) {
    const v1::Tool& tool = request.tools(i);
    OrderedJson function = {{"name", tool.name()}};
    if (tool.has_description()) function["description"] = tool.description();
    if (tool.has_parameters()) {
      auto parameters = ParseText(tool.parameters(), fmt::format("tools[{}].parameters", i));
      if (!parameters.ok()) return parameters.error();
      function["parameters"] = *std::move(parameters);
    }
    (*body)["tools"].push_back({{"type", "function"}, {"function", std::move(function)}});
  }
  if (request.tool_choice().has_mode()) {
    (*body)["tool_choice"] = request.tool_choice().mode();
  } else if (request.tool_choice().has_function()) {
    (*body)["tool_choice"] = {{"type", "function"},
                              {"function", {{"name", request.tool_choice().function()}}}};
  }
  return std::nullopt;
}

std::optional<ApiError> CopyConstraint(const v1::Constraint& constraint, OrderedJson* body) {
  OrderedJson& wanted = (*body)["structured_outputs"];
  switch (constraint.kind_case()) {
    case v1::Constraint::kJson: {
      auto schema = ParseText(constraint.json(), "structured_outputs.json");
      if (!schema.ok()) return schema.error();
      wanted["json"] = *std::move(schema);
      break;
    }
    case v1::Constraint::kJsonObject:
      wanted["json_object"] = constraint.json_object();
      break;
    case v1::Constraint::kRegex:
      wanted["regex"] = constraint.regex();
      break;
    case v1::Constraint::kChoice:
      wanted["choice"] = OrderedJson::array();
      for (const std::string& choice : constraint.choice().choices()) wanted["choice"].push_back(choice);
      break;
    case v1::Constraint::kGrammar:
      wanted["grammar"] = constraint.grammar();
      break;
    case v1::Constraint::KIND_NOT_SET:
      break;
  }
  return std::nullopt;
}

void CopyLists(const v1::CompleteRequest& request, OrderedJson* body) {
  for (const std::string& stop : request.stop()) (*body)["stop"].push_back(stop);
  for (const int32_t id : request.stop_token_ids()) (*body)["stop_token_ids"].push_back(id);
  for (const auto& [id, bias] : request.logit_bias()) (*body)["logit_bias"][std::to_string(id)] = bias;
  for (const auto& [key, value] : request.metadata()) (*body)["metadata"][key] = value;
}

}  // namespace

ApiResult<ChatBody> ChatBodyOf(const v1::CompleteRequest& request) {
  ChatBody out;
  OrderedJson body = OrderedJson::object();
  if (auto error = CopyScalars(request, &body)) return *error;
  CopyLists(request, &body);
  switch (request.input_case()) {
    case v1::CompleteRequest::kMessages:
      body["messages"] = OrderedJson::array();
      for (const v1::Message& message : request.messages().messages())
        body["messages"].push_back(MessageJson(message));
      if (request.has_top_logprobs()) body["logprobs"] = true;
      break;
    case v1::CompleteRequest::kText:
    case v1::CompleteRequest::kTokenIds:
      out.endpoint = Endpoint::kCompletions;
      if (request.has_text()) {
        body["prompt"] = request.text();
      } else {
        body["prompt"] = OrderedJson::array();
        for (const int32_t id : request.token_ids().ids()) body["prompt"].push_back(id);
      }
      if (request.has_top_logprobs()) {
        body.erase("top_logprobs");
        body["logprobs"] = request.top_logprobs();
      }
      break;
    case v1::CompleteRequest::INPUT_NOT_SET:
      return BadRequest("input", "'messages', 'text' or 'token_ids' is required");
  }
  if (auto error = CopyTools(request, &body)) return *error;
  if (request.chat_template_kwargs().has_enable_thinking())
    body["chat_template_kwargs"] = {{"enable_thinking", request.chat_template_kwargs().enable_thinking()}};
  if (request.has_structured_outputs()) {
    if (auto error = CopyConstraint(request.structured_outputs(), &body)) return *error;
  }
  out.text = DumpJson(body);
  return out;
}

v1::CompleteResponse ChatProtoFormat::Envelope(const Usage& usage) const {
  v1::CompleteResponse response;
  response.set_id(request_.id);
  response.set_created(created_);
  response.set_model(model_.name);
  v1::Usage* const counts = response.mutable_usage();
  counts->set_prompt_tokens(usage.prompt_tokens);
  counts->set_completion_tokens(usage.completion_tokens);
  counts->set_cached_tokens(usage.cached_tokens);
  counts->set_reasoning_tokens(usage.reasoning_tokens);
  return response;
}

void ChatProtoFormat::AppendTokens(const ChoiceDelta& delta, v1::Choice* choice) const {
  const auto fill = [this](engine::TokenId id, float logprob, v1::TokenLogprob* out) {
    const auto bytes = tokenizer_.Bytes(id);
    out->set_token_id(id);
    out->set_token(bytes.data(), bytes.size());
    out->set_logprob(logprob);
  };
  const auto add = [&](const engine::SampledToken& token) {
    v1::TokenLogprob* const out = choice->add_logprobs();
    fill(token.token, token.logprob, out);
    for (const auto& top : token.top) fill(top.token, top.logprob, out->add_top());
  };
  if (request_.return_token_ids) {
    for (const engine::SampledToken& token : delta.tokens) choice->add_token_ids(token.token);
  }
  if (request_.sampling.num_logprobs < 0) return;
  for (const engine::SampledToken& token : delta.prompt) add(token);
  for (const engine::SampledToken& token : delta.tokens) add(token);
}

void ChatProtoFormat::Append(const ChoiceDelta& delta, v1::Choice* choice) {
  const auto index = static_cast<size_t>(delta.choice);
  choice->set_index(delta.choice);
  v1::Message* const message = choice->mutable_message();
  if (!begun_[index]) {
    begun_[index] = true;
    message->set_role("assistant");
    if (request_.sampling.prompt_logprobs) {
      const engine::TokenId id = request_.PromptOf(delta.choice).front();
      const auto bytes = tokenizer_.Bytes(id);
      v1::TokenLogprob* const first = choice->add_logprobs();
      first->set_token_id(id);
      first->set_token(bytes.data(), bytes.size());
    }
    if (request_.return_token_ids) {
      const std::vector<int32_t>& prompt = request_.PromptOf(delta.choice);
      choice->mutable_prompt_token_ids()->Assign(prompt.begin(), prompt.end());
    }
  }
  message->mutable_content()->append(delta.parts.content);
  message->mutable_reasoning_content()->append(delta.parts.reasoning);
  for (const ToolCallDelta& piece : delta.parts.tool_calls) {
    const int count = message->tool_calls_size();
    const bool goes_on = count > 0 && message->tool_calls(count - 1).index() == piece.index;
    v1::ToolCall* const call = goes_on ? message->mutable_tool_calls(count - 1) : message->add_tool_calls();
    call->set_index(piece.index);
    if (!piece.name.empty()) {
      call->set_id(piece.id);
      call->set_name(piece.name);
    }
    call->mutable_arguments()->append(piece.arguments);
  }
  AppendTokens(delta, choice);
  choice->set_finish_reason(delta.finish);
}

}  // namespace millrace::server
