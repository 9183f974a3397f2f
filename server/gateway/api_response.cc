#include "server/gateway/api_response.h"

#include <algorithm>
#include <cmath>

namespace millrace::server {
namespace {

// JSON has no infinities: a token that was masked out reads as a very small probability.
double FiniteLogprob(float logprob) { return std::isfinite(logprob) ? logprob : -9999.0; }

int64_t CountCharacters(const std::string& text) {
  return std::count_if(text.begin(), text.end(),
                       [](char c) { return (static_cast<unsigned char>(c) & 0xc0U) != 0x80U; });
}

Json TokenIds(const std::vector<engine::SampledToken>& tokens) {
  Json ids = Json::array();
  for (const engine::SampledToken& token : tokens) ids.push_back(token.token);
  return ids;
}

std::string Frame(const std::string& body) { return "data: " + body + "\n\n"; }

Json ToolCallPiece(const ToolCallDelta& piece) {
  Json json = {{"index", piece.index}, {"function", {{"arguments", piece.arguments}}}};
  if (!piece.name.empty()) {
    json["id"] = piece.id;
    json["type"] = "function";
    json["function"]["name"] = piece.name;
  }
  return json;
}

}  // namespace

Json UsageJson(const Usage& usage) {
  return {{"prompt_tokens", usage.prompt_tokens},
          {"completion_tokens", usage.completion_tokens},
          {"total_tokens", usage.prompt_tokens + usage.completion_tokens},
          {"prompt_tokens_details", {{"cached_tokens", usage.cached_tokens}}},
          {"completion_tokens_details", {{"reasoning_tokens", usage.reasoning_tokens}}}};
}

ResponseBuilder::ResponseBuilder(const ApiRequest& request, const ModelInfo& model,
                                 const engine::Tokenizer& tokenizer, int64_t created)
    : request_(request),
      model_(model),
      tokenizer_(tokenizer),
      created_(created),
      collected_(static_cast<size_t>(request.num_choices())),
      text_offsets_(collected_.size()),
      prompt_ids_said_(collected_.size()) {}

Json ResponseBuilder::Envelope(bool chunk) const {
  return {{"id", request_.id},
          {"object", chat() ? (chunk ? "chat.completion.chunk" : "chat.completion") : "text_completion"},
          {"created", created_},
          {"model", model_.name}};
}

Json ResponseBuilder::Logprobs(const Tokens& prompt, const Tokens& tokens, int32_t choice) {
  if (request_.sampling.num_logprobs < 0) return nullptr;
  return chat() ? ChatLogprobs(tokens) : CompletionLogprobs(prompt, tokens, choice);
}

Json ResponseBuilder::ChatLogprobs(const Tokens& tokens) const {
  const auto entry = [this](engine::TokenId id, float logprob) -> Json {
    const std::string text(tokenizer_.Bytes(id));
    Json bytes = Json::array();
    for (const char c : text) bytes.push_back(static_cast<unsigned char>(c));
    return {{"token", text}, {"logprob", FiniteLogprob(logprob)}, {"bytes", bytes}};
  };
  Json content = Json::array();
  for (const engine::SampledToken& token : tokens) {
    Json item = entry(token.token, token.logprob);
    item["top_logprobs"] = Json::array();
    for (const auto& top : token.top) item["top_logprobs"].push_back(entry(top.token, top.logprob));
    content.push_back(std::move(item));
  }
  return {{"content", std::move(content)}, {"refusal", nullptr}};
}

// With echo the prompt's tokens come first; nothing is known of its first.
Json ResponseBuilder::CompletionLogprobs(const Tokens& prompt, const Tokens& tokens, int32_t choice) {
  int64_t& text_offset = text_offsets_[static_cast<size_t>(choice)];
  Json texts = Json::array();
  Json values = Json::array();
  Json tops = Json::array();
  Json offsets = Json::array();
  const auto add = [&](engine::TokenId id, Json value, Json top) {
    const std::string text(tokenizer_.Bytes(id));
    texts.push_back(text);
    values.push_back(std::move(value));
    tops.push_back(std::move(top));
    offsets.push_back(text_offset);
    text_offset += CountCharacters(text);
  };
  const auto add_known = [&](const engine::SampledToken& token) {
    Json top = Json::object();
    for (const auto& other : token.top)
      top[std::string(tokenizer_.Bytes(other.token))] = FiniteLogprob(other.logprob);
    add(token.token, FiniteLogprob(token.logprob), std::move(top));
  };
  if (request_.echo && text_offset == 0) add(request_.PromptOf(choice).front(), nullptr, nullptr);
  for (const engine::SampledToken& token : prompt) add_known(token);
  for (const engine::SampledToken& token : tokens) add_known(token);
  return {{"tokens", std::move(texts)},
          {"token_logprobs", std::move(values)},
          {"top_logprobs", std::move(tops)},
          {"text_offset", std::move(offsets)}};
}

std::string ResponseBuilder::Chunk(Json choice, int32_t index, const Usage& usage) const {
  Json body = Envelope(true);
  choice["index"] = index;
  body["choices"] = Json::array({std::move(choice)});
  if (request_.continuous_usage) {
    body["usage"] = UsageJson(usage);
  } else if (request_.include_usage) {
    body["usage"] = nullptr;
  }
  return Frame(DumpJson(body));
}

std::string ResponseBuilder::Begin(const Usage& usage) {
  std::string chunks;
  for (int32_t i = 0; chat() && i < request_.num_choices(); ++i) {
    Json choice = {{"delta", {{"role", "assistant"}, {"content", ""}}},
                   {"logprobs", nullptr},
                   {"finish_reason", nullptr}};
    if (request_.return_token_ids) choice["prompt_token_ids"] = request_.PromptOf(i);
    chunks += Chunk(std::move(choice), i, usage);
  }
  return chunks;
}

std::string ResponseBuilder::Delta(const ChoiceDelta& delta, const Usage& usage) {
  std::string chunks;
  bool tokens_said = false;  // they go with the first chunk
  const auto add = [&](const char* key, Json value, const Json& reason) {
    Json choice = {{"logprobs", nullptr}, {"finish_reason", reason}};
    choice[key] = std::move(value);
    if (!tokens_said && !delta.tokens.empty()) {
      choice["logprobs"] = Logprobs(delta.prompt, delta.tokens, delta.choice);
      if (request_.return_token_ids) choice["token_ids"] = TokenIds(delta.tokens);
    }
    tokens_said = true;
    const auto index = static_cast<size_t>(delta.choice);
    if (request_.return_token_ids && !chat() && !prompt_ids_said_[index]) {
      choice["prompt_token_ids"] = request_.PromptOf(delta.choice);
      prompt_ids_said_[index] = true;
    }
    chunks += Chunk(std::move(choice), delta.choice, usage);
  };
  const AnswerDelta& parts = delta.parts;
  if (!parts.reasoning.empty())
    add("delta", {{"reasoning_content", parts.reasoning}, {"reasoning", parts.reasoning}}, nullptr);
  if (!parts.content.empty()) {
    if (chat()) {
      add("delta", {{"content", parts.content}}, nullptr);
    } else {
      add("text", parts.content, nullptr);
    }
  }
  for (const ToolCallDelta& piece : parts.tool_calls)
    add("delta", {{"tool_calls", Json::array({ToolCallPiece(piece)})}}, nullptr);
  if (!delta.finish.empty()) {
    if (chat()) {
      add("delta", Json::object(), delta.finish);
    } else {
      add("text", "", delta.finish);
    }
  }
  return chunks;
}

std::string ResponseBuilder::End(const Usage& usage) {
  std::string out;
  if (request_.include_usage) {
    Json body = Envelope(true);
    body["choices"] = Json::array();
    body["usage"] = UsageJson(usage);
    out = Frame(DumpJson(body));
  }
  return out + Frame("[DONE]");
}

std::string ResponseBuilder::Failure(const ApiError& error) { return Frame(ErrorBody(error)); }

void ResponseBuilder::Collect(const ChoiceDelta& delta) {
  Collected& all = collected_[static_cast<size_t>(delta.choice)];
  all.content += delta.parts.content;
  all.reasoning += delta.parts.reasoning;
  for (const ToolCallDelta& piece : delta.parts.tool_calls) {
    if (!piece.name.empty()) {
      Json call = ToolCallPiece(piece);
      call.erase("index");
      all.tool_calls.push_back(std::move(call));
    } else {
      all.tool_calls.back()["function"]["arguments"].get_ref<std::string&>() += piece.arguments;
    }
  }
  all.prompt.insert(all.prompt.end(), delta.prompt.begin(), delta.prompt.end());
  all.tokens.insert(all.tokens.end(), delta.tokens.begin(), delta.tokens.end());
  all.finish = delta.finish;
}

Json ResponseBuilder::Message(const Collected& collected) const {
  Json message = {{"role", "assistant"}, {"content", collected.content}, {"refusal", nullptr}};
  if (!collected.reasoning.empty()) {
    message["reasoning_content"] = collected.reasoning;
    message["reasoning"] = collected.reasoning;
  }
  if (!collected.tool_calls.empty()) {
    message["tool_calls"] = collected.tool_calls;
    if (collected.content.empty()) message["content"] = nullptr;
  }
  return message;
}

std::string ResponseBuilder::Whole(const Usage& usage) {
  Json choices = Json::array();
  for (int32_t i = 0; i < request_.num_choices(); ++i) {
    const Collected& collected = collected_[static_cast<size_t>(i)];
    Json choice = {{"index", i},
                   {"logprobs", Logprobs(collected.prompt, collected.tokens, i)},
                   {"finish_reason", collected.finish}};
    if (chat()) {
      choice["message"] = Message(collected);
    } else {
      choice["text"] = collected.content;
    }
    if (request_.return_token_ids) {
      choice["token_ids"] = TokenIds(collected.tokens);
      choice["prompt_token_ids"] = request_.PromptOf(i);
    }
    choices.push_back(std::move(choice));
  }
  Json body = Envelope(false);
  body["choices"] = std::move(choices);
  body["usage"] = UsageJson(usage);
  return DumpJson(body);
}

}  // namespace millrace::server
