#include "server/gateway/api_response.h"

#include <algorithm>
#include <cmath>

namespace millrace::server {
namespace {

Json UsageJson(const Usage& usage) {
  return {{"prompt_tokens", usage.prompt_tokens},
          {"completion_tokens", usage.completion_tokens},
          {"total_tokens", usage.prompt_tokens + usage.completion_tokens},
          {"prompt_tokens_details", {{"cached_tokens", usage.cached_tokens}}}};
}

// JSON has no infinities: a token that was masked out reads as a very small probability.
double FiniteLogprob(float logprob) { return std::isfinite(logprob) ? logprob : -9999.0; }

int64_t CountCharacters(const std::string& text) {
  return std::count_if(text.begin(), text.end(),
                       [](char c) { return (static_cast<unsigned char>(c) & 0xc0U) != 0x80U; });
}

}  // namespace

ResponseBuilder::ResponseBuilder(const ApiRequest& request, const ModelInfo& model,
                                 const engine::Tokenizer& tokenizer, int64_t created)
    : request_(request), model_(model), tokenizer_(tokenizer), created_(created) {}

void ResponseBuilder::AddToken(const engine::SampledToken& token) {
  if (request_.sampling.num_logprobs >= 0) pending_logprobs_.push_back(token);
}

Json ResponseBuilder::Envelope(bool chunk) const {
  const bool chat = request_.endpoint == Endpoint::kChat;
  return {{"id", request_.id},
          {"object", chat ? (chunk ? "chat.completion.chunk" : "chat.completion") : "text_completion"},
          {"created", created_},
          {"model", model_.name}};
}

std::string ResponseBuilder::TokenText(engine::TokenId token) const {
  return std::string(tokenizer_.Bytes(token));
}

Json ResponseBuilder::TakeLogprobs() {
  if (request_.sampling.num_logprobs < 0) return nullptr;
  Json logprobs = request_.endpoint == Endpoint::kChat ? TakeChatLogprobs() : TakeCompletionLogprobs();
  pending_logprobs_.clear();
  return logprobs;
}

Json ResponseBuilder::TakeChatLogprobs() {
  const auto entry = [this](engine::TokenId id, float logprob) -> Json {
    const std::string text = TokenText(id);
    Json bytes = Json::array();
    for (const char c : text) bytes.push_back(static_cast<unsigned char>(c));
    return {{"token", text}, {"logprob", FiniteLogprob(logprob)}, {"bytes", bytes}};
  };
  Json content = Json::array();
  for (const engine::SampledToken& token : pending_logprobs_) {
    Json item = entry(token.token, token.logprob);
    item["top_logprobs"] = Json::array();
    for (const auto& top : token.top) item["top_logprobs"].push_back(entry(top.token, top.logprob));
    content.push_back(std::move(item));
  }
  return {{"content", std::move(content)}, {"refusal", nullptr}};
}

Json ResponseBuilder::TakeCompletionLogprobs() {
  Json tokens = Json::array();
  Json values = Json::array();
  Json tops = Json::array();
  Json offsets = Json::array();
  for (const engine::SampledToken& token : pending_logprobs_) {
    const std::string text = TokenText(token.token);
    tokens.push_back(text);
    values.push_back(FiniteLogprob(token.logprob));
    Json top = Json::object();
    for (const auto& other : token.top) top[TokenText(other.token)] = FiniteLogprob(other.logprob);
    tops.push_back(std::move(top));
    offsets.push_back(text_offset_);
    text_offset_ += CountCharacters(text);
  }
  return {{"tokens", std::move(tokens)},
          {"token_logprobs", std::move(values)},
          {"top_logprobs", std::move(tops)},
          {"text_offset", std::move(offsets)}};
}

std::string ResponseBuilder::Chunk(Json choice, const Usage& usage) {
  Json body = Envelope(true);
  choice["index"] = 0;
  body["choices"] = Json::array({std::move(choice)});
  if (request_.continuous_usage) {
    body["usage"] = UsageJson(usage);
  } else if (request_.include_usage) {
    body["usage"] = nullptr;
  }
  return DumpJson(body);
}

std::string ResponseBuilder::RoleChunk(const Usage& usage) {
  return Chunk({{"delta", {{"role", "assistant"}, {"content", ""}}},
                {"logprobs", nullptr},
                {"finish_reason", nullptr}},
               usage);
}

std::string ResponseBuilder::TextChunk(const std::string& text, const Usage& usage) {
  Json choice = {{"logprobs", TakeLogprobs()}, {"finish_reason", nullptr}};
  if (request_.endpoint == Endpoint::kChat) {
    choice["delta"] = {{"content", text}};
  } else {
    choice["text"] = text;
  }
  return Chunk(std::move(choice), usage);
}

std::string ResponseBuilder::FinishChunk(const std::string& reason, const Usage& usage) {
  Json choice = {{"logprobs", nullptr}, {"finish_reason", reason}};
  if (!pending_logprobs_.empty()) choice["logprobs"] = TakeLogprobs();
  if (request_.endpoint == Endpoint::kChat) {
    choice["delta"] = Json::object();
  } else {
    choice["text"] = "";
  }
  return Chunk(std::move(choice), usage);
}

std::string ResponseBuilder::UsageChunk(const Usage& usage) {
  Json body = Envelope(true);
  body["choices"] = Json::array();
  body["usage"] = UsageJson(usage);
  return DumpJson(body);
}

std::string ResponseBuilder::Body(const std::string& text, const std::string& reason, const Usage& usage) {
  Json choice = {{"index", 0}, {"logprobs", TakeLogprobs()}, {"finish_reason", reason}};
  if (request_.endpoint == Endpoint::kChat) {
    choice["message"] = {{"role", "assistant"}, {"content", text}, {"refusal", nullptr}};
  } else {
    choice["text"] = text;
  }
  Json body = Envelope(false);
  body["choices"] = Json::array({std::move(choice)});
  body["usage"] = UsageJson(usage);
  return DumpJson(body);
}

}  // namespace millrace::server
