#include "server/gateway/api_request.h"

#include <cmath>
#include <set>

#include "base/net.h"
#include "base/random.h"
#include "server/gateway/chat_messages.h"

namespace millrace::server {
namespace {

constexpr size_t kStopStringsMax = 16;
constexpr size_t kStopBytesMax = 1024;
constexpr size_t kLogitBiasMax = 1024;

// Fields that change the answer and that this server does not honour: refused, never ignored.
struct Refusal {
  const char* field;
  const char* reason;
};
constexpr Refusal kRefused[] = {
    {"response_format", "constrained output is not supported by this server; only {\"type\":\"text\"} is"},
    {"structured_outputs", "constrained output is not supported by this server"},
    {"guided_json", "constrained output is not supported by this server"},
    {"guided_regex", "constrained output is not supported by this server"},
    {"guided_choice", "constrained output is not supported by this server"},
    {"guided_grammar", "constrained output is not supported by this server"},
    {"audio", "audio is not supported by this model"},
    {"prediction", "predicted outputs are not supported by this server"},
    {"functions", "functions is deprecated and not supported; use tools"},
    {"function_call", "function_call is deprecated and not supported; use tool_choice"},
    {"suffix", "suffix is not supported by this model"},
    {"prompt_logprobs", "prompt_logprobs is not supported by this server"},
    {"best_of", "best_of is not supported by this server"},
    {"bad_words", "bad_words is not supported by this server; use logit_bias"},
    {"allowed_token_ids", "allowed_token_ids is not supported by this server; use logit_bias"},
};

const std::set<std::string>& KnownFields() {
  static const std::set<std::string> known = {"model",
                                              "messages",
                                              "prompt",
                                              "max_tokens",
                                              "max_completion_tokens",
                                              "temperature",
                                              "top_p",
                                              "top_k",
                                              "min_p",
                                              "n",
                                              "stop",
                                              "seed",
                                              "stream",
                                              "stream_options",
                                              "logprobs",
                                              "top_logprobs",
                                              "logit_bias",
                                              "presence_penalty",
                                              "frequency_penalty",
                                              "repetition_penalty",
                                              "min_tokens",
                                              "ignore_eos",
                                              "stop_token_ids",
                                              "skip_special_tokens",
                                              "chat_template_kwargs",
                                              "tools",
                                              "tool_choice",
                                              "parallel_tool_calls",
                                              "reasoning_effort",
                                              "user",
                                              "echo",
                                              "priority",
                                              "cache_salt",
                                              "timeout",
                                              "response_format",
                                              "metadata",
                                              "store",
                                              "service_tier",
                                              "safety_identifier",
                                              "prompt_cache_key",
                                              "modalities",
                                              "add_generation_prompt"};
  return known;
}

// Reads fields of one object; the first error wins and names the field.
class Fields {
 public:
  explicit Fields(const Json& body) : body_(body) {}

  bool Has(const char* key) const { return body_.contains(key) && !body_[key].is_null(); }

  template <typename T>
  void Number(const char* key, double low, double high, T* out) {
    if (error_ || !Has(key)) return;
    const auto value = GetNumber(body_, key);
    if (!value.ok()) return Fail(key, std::string(Message(value.status())));
    if (!std::isfinite(**value) || **value < low || **value > high) {
      return Fail(key, fmt::format("'{}' must be between {} and {}, not {}", key, low, high, **value));
    }
    *out = static_cast<T>(**value);
  }
  void Integer(const char* key, int64_t low, int64_t high, int32_t* out) {
    if (error_ || !Has(key)) return;
    const auto value = GetInt(body_, key);
    if (!value.ok()) return Fail(key, std::string(Message(value.status())));
    if (**value < low || **value > high) {
      return Fail(key, fmt::format("'{}' must be between {} and {}, not {}", key, low, high, **value));
    }
    *out = static_cast<int32_t>(**value);
  }
  void Bool(const char* key, bool* out) {
    if (error_ || !Has(key)) return;
    const auto value = GetBool(body_, key);
    if (!value.ok()) return Fail(key, std::string(Message(value.status())));
    *out = **value;
  }
  void Fail(std::string param, std::string message) {
    if (!error_) error_ = BadRequest(std::move(param), std::move(message));
  }
  const std::optional<ApiError>& error() const { return error_; }
  const Json& body() const { return body_; }

 private:
  const Json& body_;
  std::optional<ApiError> error_;
};

void ParseStop(Fields& fields, ApiRequest* request) {
  if (!fields.Has("stop")) return;
  const Json& stop = fields.body()["stop"];
  const Json list = stop.is_string() ? Json::array({stop}) : stop;
  if (!list.is_array() || list.size() > kStopStringsMax) {
    return fields.Fail(
        "stop", fmt::format("'stop' must be a string or a list of at most {} strings", kStopStringsMax));
  }
  for (const Json& entry : list) {
    if (!entry.is_string() || entry.get_ref<const std::string&>().empty() ||
        entry.get_ref<const std::string&>().size() > kStopBytesMax) {
      return fields.Fail("stop",
                         fmt::format("every 'stop' must be a string of 1 to {} bytes", kStopBytesMax));
    }
    request->stop.push_back(entry.get<std::string>());
  }
}

void ParseTokenLists(Fields& fields, const engine::Tokenizer& tokenizer, ApiRequest* request) {
  if (fields.Has("stop_token_ids")) {
    const Json& ids = fields.body()["stop_token_ids"];
    if (!ids.is_array() || ids.size() > 64) {
      return fields.Fail("stop_token_ids", "'stop_token_ids' must be a list of at most 64 token ids");
    }
    for (const Json& id : ids) {
      if (!id.is_number_integer() || id < 0 || id >= tokenizer.size()) {
        return fields.Fail("stop_token_ids",
                           fmt::format("'stop_token_ids' must be token ids below {}", tokenizer.size()));
      }
      request->sampling.stop_token_ids.push_back(id.get<int32_t>());
    }
  }
  if (!fields.Has("logit_bias")) return;
  const Json& biases = fields.body()["logit_bias"];
  if (!biases.is_object() || biases.size() > kLogitBiasMax) {
    return fields.Fail("logit_bias",
                       fmt::format("'logit_bias' must be an object of at most {} entries", kLogitBiasMax));
  }
  for (const auto& [key, value] : biases.items()) {
    char* end = nullptr;
    const int64_t token = std::strtoll(key.c_str(), &end, 10);
    if (key.empty() || *end != '\0' || token < 0 || token >= tokenizer.size()) {
      return fields.Fail("logit_bias", fmt::format("'logit_bias' key '{}' is not a token id below {}", key,
                                                   tokenizer.size()));
    }
    if (!value.is_number() || std::abs(value.get<double>()) > 100) {
      return fields.Fail("logit_bias",
                         fmt::format("'logit_bias[{}]' must be a number from -100 to 100", key));
    }
    request->sampling.logit_bias.emplace_back(static_cast<int32_t>(token), value.get<float>());
  }
}

void ParseLogprobs(Fields& fields, ApiRequest* request) {
  int32_t top = 0;
  if (request->endpoint == Endpoint::kCompletions) {
    if (!fields.Has("logprobs")) return;
    fields.Integer("logprobs", 0, 20, &top);
    request->sampling.num_logprobs = top;
    return;
  }
  bool wanted = false;
  fields.Bool("logprobs", &wanted);
  if (fields.Has("top_logprobs") && !wanted) {
    return fields.Fail("top_logprobs", "'top_logprobs' needs 'logprobs': true");
  }
  fields.Integer("top_logprobs", 0, 20, &top);
  if (wanted) request->sampling.num_logprobs = top;
}

void ParseStreaming(Fields& fields, ApiRequest* request) {
  fields.Bool("stream", &request->stream);
  if (!fields.Has("stream_options")) return;
  if (!request->stream)
    return fields.Fail("stream_options", "'stream_options' is only allowed with 'stream': true");
  const Json& options = fields.body()["stream_options"];
  if (!options.is_object()) return fields.Fail("stream_options", "'stream_options' must be an object");
  Fields inner(options);
  inner.Bool("include_usage", &request->include_usage);
  inner.Bool("continuous_usage_stats", &request->continuous_usage);
  if (inner.error()) fields.Fail("stream_options." + *inner.error()->param, inner.error()->message);
}

void ParseSampling(Fields& fields, ApiRequest* request) {
  engine::SamplingParams& sampling = request->sampling;
  fields.Number("temperature", 0, 2, &sampling.temperature);
  fields.Number("top_p", 0, 1, &sampling.top_p);
  if (!fields.error() && sampling.top_p <= 0) fields.Fail("top_p", "'top_p' must be more than 0");
  if (fields.Has("top_k")) {
    fields.Integer("top_k", -1, INT32_MAX, &sampling.top_k);
    if (sampling.top_k < 0) sampling.top_k = 0;  // -1 means off, as clients of other servers send it
  }
  fields.Number("min_p", 0, 1, &sampling.min_p);
  fields.Number("repetition_penalty", 0.01, 100, &sampling.repetition_penalty);
  fields.Number("presence_penalty", -2, 2, &sampling.presence_penalty);
  fields.Number("frequency_penalty", -2, 2, &sampling.frequency_penalty);
  fields.Bool("ignore_eos", &sampling.ignore_eos);
  sampling.seed = RandomId();
  if (fields.Has("seed")) {
    const Json& seed = fields.body()["seed"];
    if (!seed.is_number_integer()) return fields.Fail("seed", "'seed' must be an integer");
    sampling.seed =
        seed.is_number_unsigned() ? seed.get<uint64_t>() : static_cast<uint64_t>(seed.get<int64_t>());
  }
}

std::optional<ApiError> CheckRefused(const Json& body) {
  for (const Refusal& refusal : kRefused) {
    if (!body.contains(refusal.field) || body[refusal.field].is_null()) continue;
    const Json& value = body[refusal.field];
    if (std::string_view(refusal.field) == "response_format" && value.is_object() &&
        value.value("type", Json()) == "text") {
      continue;
    }
    return BadRequest(refusal.field, refusal.reason);
  }
  return std::nullopt;
}

// prompt: a string, a list of one string, or a list of token ids.
std::optional<ApiError> ParsePrompt(const Json& body, const engine::Tokenizer& tokenizer,
                                    ApiRequest* request) {
  if (!body.contains("prompt") || body["prompt"].is_null())
    return BadRequest("prompt", "'prompt' is required");
  const Json* prompt = &body["prompt"];
  if (prompt->is_array() && prompt->size() == 1 && ((*prompt)[0].is_string() || (*prompt)[0].is_array())) {
    prompt = &(*prompt)[0];
  }
  if (prompt->is_string()) {
    auto ids = tokenizer.Encode(prompt->get_ref<const std::string&>());
    if (!ids.ok()) return BadRequest("prompt", std::string(Message(ids.status())));
    request->prompt = *std::move(ids);
  } else if (prompt->is_array()) {
    for (const Json& id : *prompt) {
      if (id.is_string())
        return BadRequest("prompt", "several prompts in one request are not supported by this server");
      if (!id.is_number_integer() || id < 0 || id >= tokenizer.size()) {
        return BadRequest("prompt", fmt::format("'prompt' must hold token ids below {}", tokenizer.size()));
      }
      request->prompt.push_back(id.get<int32_t>());
    }
  } else {
    return BadRequest("prompt", "'prompt' must be a string or a list of token ids");
  }
  if (request->prompt.empty()) return BadRequest("prompt", "'prompt' is empty");
  return std::nullopt;
}

std::optional<ApiError> ParseChat(std::string_view text, const ModelInfo& model,
                                  const engine::Tokenizer& tokenizer, ApiRequest* request) {
  // Tools and arguments are rendered back to text, so their keys keep the client's order.
  const auto ordered = ParseOrderedJson(text);
  if (!ordered.ok()) return BadRequest("", std::string(Message(ordered.status())));
  auto chat = ParseChatRequest(*ordered);
  if (!chat.ok()) return chat.error();
  auto rendered = engine::RenderChat(model.chat_format, *chat);
  if (!rendered.ok()) return BadRequest("messages", std::string(Message(rendered.status())));
  auto ids = tokenizer.Encode(*rendered);
  if (!ids.ok()) return BadRequest("messages", std::string(Message(ids.status())));
  request->prompt = *std::move(ids);
  return std::nullopt;
}

void ParseMaxTokens(Fields& fields, const ModelInfo& model, ApiRequest* request) {
  const auto prompt = static_cast<int32_t>(request->prompt.size());
  const int32_t room = model.context_max - prompt;
  if (room < 1) {
    fields.Fail(
        request->endpoint == Endpoint::kChat ? "messages" : "prompt",
        fmt::format("the prompt has {} tokens and leaves no room for an answer: the context holds {} tokens",
                    prompt, model.context_max));
    return;
  }
  int32_t max_tokens = request->endpoint == Endpoint::kChat ? room : std::min(16, room);
  const char* key = fields.Has("max_completion_tokens") ? "max_completion_tokens" : "max_tokens";
  fields.Integer(key, 1, INT32_MAX, &max_tokens);
  if (!fields.error() && max_tokens > room) {
    fields.Fail(key, fmt::format("prompt of {} tokens + {} of {} is more than the context of {} tokens",
                                 prompt, key, max_tokens, model.context_max));
  }
  request->sampling.max_tokens = max_tokens;
  fields.Integer("min_tokens", 0, max_tokens, &request->sampling.min_tokens);
}

}  // namespace

ApiResult<ApiRequest> ParseApiRequest(Endpoint endpoint, std::string_view text, const ModelInfo& model,
                                      const engine::Tokenizer& tokenizer) {
  if (!IsUtf8(text)) return BadRequest("", "the request body is not valid UTF-8");
  const auto parsed = ParseJson(text);
  if (!parsed.ok()) return BadRequest("", std::string(Message(parsed.status())));
  const Json& body = *parsed;
  if (!body.is_object()) return BadRequest("", "the request body must be a JSON object");

  const auto model_name = GetString(body, "model");
  if (!model_name.ok()) return BadRequest("model", std::string(Message(model_name.status())));
  if (model_name->has_value() && **model_name != model.name) {
    ApiError error = BadRequest("model", fmt::format("the model '{}' does not exist; this server serves '{}'",
                                                     **model_name, model.name));
    error.http_status = 404;
    error.code = "model_not_found";
    return error;
  }
  if (auto refused = CheckRefused(body)) return *refused;

  ApiRequest request;
  request.endpoint = endpoint;
  request.id = RandomName(endpoint == Endpoint::kChat ? "chatcmpl-" : "cmpl-");
  Fields fields(body);
  int32_t n = 1;
  fields.Integer("n", 1, 1, &n);
  ParseSampling(fields, &request);
  ParseStop(fields, &request);
  ParseTokenLists(fields, tokenizer, &request);
  ParseLogprobs(fields, &request);
  ParseStreaming(fields, &request);
  fields.Integer("priority", -1000, 1000, &request.priority);
  fields.Bool("skip_special_tokens", &request.skip_special_tokens);
  if (endpoint == Endpoint::kCompletions) fields.Bool("echo", &request.echo);
  double timeout = 0;
  if (fields.Has("timeout")) {
    fields.Number("timeout", 0.001, 86400, &timeout);
    request.timeout_seconds = timeout;
  }
  if (fields.error()) return *fields.error();
  const auto salt = GetString(body, "cache_salt");
  if (!salt.ok()) return BadRequest("cache_salt", std::string(Message(salt.status())));
  request.cache_salt = salt->value_or("");

  const auto prompt_error = endpoint == Endpoint::kChat ? ParseChat(text, model, tokenizer, &request)
                                                        : ParsePrompt(body, tokenizer, &request);
  if (prompt_error) return *prompt_error;
  ParseMaxTokens(fields, model, &request);
  if (fields.error()) {
    ApiError error = *fields.error();
    if (error.message.find("context") != std::string::npos) error.code = "context_length_exceeded";
    return error;
  }
  for (const auto& [key, value] : body.items()) {
    if (!KnownFields().contains(key)) request.unknown_fields.push_back(key);
  }
  return request;
}

}  // namespace millrace::server
