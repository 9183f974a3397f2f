#include "server/gateway/api_request.h"

#include <algorithm>
#include <cmath>
#include <iterator>
#include <set>
#include <span>

#include "base/net.h"
#include "base/random.h"
#include "server/gateway/chat_messages.h"
#include "server/gateway/fields.h"
#include "server/gateway/structured_output.h"

namespace millrace::server {
namespace {

constexpr size_t kStopStringsMax = 16;
constexpr size_t kStopBytesMax = 1024;
constexpr size_t kLogitBiasMax = 1024;
constexpr size_t kStopTokensMax = 64;
constexpr size_t kPromptsMax = 64;
constexpr int32_t kNMax = 16;
constexpr size_t kNameBytesMax = 1024;  // user, cache_salt and their like

// Fields that change the answer and that this server does not honour: refused, never ignored. A value that
// asks for nothing is taken.
struct Refusal {
  const char* field;
  const char* accepted;  // JSON of the values that ask for nothing, as a list
  const char* reason;
};
constexpr Refusal kRefused[] = {
    {"audio", "[]", "audio is not supported by this model"},
    {"modalities", R"([["text"]])", "this model answers in text only"},
    {"prediction", "[]", "predicted outputs are not supported by this server"},
    {"functions", "[]", "functions is deprecated and not supported; use tools"},
    {"function_call", "[]", "function_call is deprecated and not supported; use tool_choice"},
    {"web_search_options", "[]", "this server does not search the web"},
    {"verbosity", R"(["medium"])", "this model has no verbosity setting"},
    {"service_tier", R"(["auto","default"])", "this server has one service tier: 'auto' or 'default'"},
    {"store", "[false]", "this server stores no answers"},
    {"suffix", R"([""])", "suffix is not supported by this model"},
    {"prompt_logprobs", "[]",
     "prompt_logprobs is not supported by this server; use /v1/completions with echo and logprobs"},
    {"best_of", "[1]", "best_of is not supported by this server; use n"},
    {"bad_words", "[[]]", "bad_words is not supported by this server; use logit_bias"},
    {"allowed_token_ids", "[]", "allowed_token_ids is not supported by this server; use logit_bias"},
    {"use_beam_search", "[false]", "beam search is not supported by this server"},
};

// Fields that only one of the two requests has: there they would change the answer, here nobody would read
// them.
constexpr const char* kChatOnly[] = {"messages",
                                     "tools",
                                     "tool_choice",
                                     "parallel_tool_calls",
                                     "reasoning_effort",
                                     "include_reasoning",
                                     "separate_reasoning",
                                     "chat_template_kwargs",
                                     "add_generation_prompt",
                                     "continue_final_message",
                                     "max_completion_tokens",
                                     "top_logprobs"};
constexpr const char* kCompletionsOnly[] = {"prompt", "echo"};

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
                                              "timeout",
                                              "response_format",
                                              "metadata",
                                              "safety_identifier",
                                              "prompt_cache_key",
                                              "add_generation_prompt",
                                              "continue_final_message",
                                              "include_stop_str_in_output",
                                              "truncate_prompt_tokens",
                                              "return_token_ids",
                                              "include_reasoning",
                                              "separate_reasoning",
                                              "request_id",
                                              "cache_salt",
                                              "structured_outputs",
                                              "guided_json",
                                              "guided_regex",
                                              "guided_choice",
                                              "guided_grammar",
                                              "add_special_tokens"};
  return known;
}

bool IsKnown(const std::string& field) {
  return KnownFields().contains(field) ||
         std::any_of(std::begin(kRefused), std::end(kRefused),
                     [&](const Refusal& refusal) { return field == refusal.field; });
}

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
  fields.TokenIds("stop_token_ids", kStopTokensMax, tokenizer.size(), &request->sampling.stop_token_ids);
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

std::optional<ApiError> CheckRefused(Endpoint endpoint, const Json& body) {
  const bool chat = endpoint == Endpoint::kChat;
  for (const char* field : chat ? std::span<const char* const>(kCompletionsOnly) : std::span(kChatOnly)) {
    if (body.contains(field) && !body[field].is_null())
      return BadRequest(field, fmt::format("'{}' is a field of {}", field,
                                           chat ? "/v1/completions" : "/v1/chat/completions"));
  }
  for (const Refusal& refusal : kRefused) {
    if (!body.contains(refusal.field) || body[refusal.field].is_null()) continue;
    const auto accepted = ParseJson(refusal.accepted);
    if (std::find(accepted->begin(), accepted->end(), body[refusal.field]) == accepted->end())
      return BadRequest(refusal.field, refusal.reason);
  }
  return std::nullopt;
}

// Fields that name somebody or something and change nothing in the answer.
void CheckNames(Fields& fields, ApiRequest* request) {
  std::string ignored;
  for (const char* key : {"user", "safety_identifier", "prompt_cache_key"})
    fields.String(key, kNameBytesMax, &ignored);
  fields.String("cache_salt", kNameBytesMax, &request->cache_salt);
  fields.String("request_id", 128, &request->request_id);
  if (!fields.error() && fields.Has("request_id") && !IsRequestId(request->request_id))
    fields.Fail("request_id", "'request_id' must be 1 to 128 of letters, digits, '-', '_' and '.'");
  if (!fields.Has("metadata")) return;
  const Json& metadata = fields.body()["metadata"];
  const bool good = metadata.is_object() && metadata.size() <= 16 &&
                    std::all_of(metadata.begin(), metadata.end(), [](const Json& value) {
                      return value.is_string() && value.get_ref<const std::string&>().size() <= 512;
                    });
  if (!good)
    fields.Fail("metadata", "'metadata' must be an object of at most 16 strings of at most 512 bytes");
}

std::optional<ApiError> AddPrompt(const Json& prompt, const std::string& param,
                                  const engine::Tokenizer& tokenizer, ApiRequest* request) {
  std::vector<int32_t>& ids = request->prompts.emplace_back();
  if (prompt.is_string()) {
    auto encoded = tokenizer.Encode(prompt.get_ref<const std::string&>());
    if (!encoded.ok()) return BadRequest(param, std::string(Message(encoded.status())));
    ids = *std::move(encoded);
  } else if (prompt.is_array()) {
    for (const Json& id : prompt) {
      if (!id.is_number_integer() || id < 0 || id >= tokenizer.size())
        return BadRequest(param, fmt::format("'{}' must hold token ids below {}", param, tokenizer.size()));
      ids.push_back(id.get<int32_t>());
    }
  } else {
    return BadRequest(param, fmt::format("'{}' must be a string or a list of token ids", param));
  }
  if (ids.empty()) return BadRequest(param, fmt::format("'{}' is empty", param));
  return std::nullopt;
}

// prompt: a string, a list of token ids, or a list of either.
std::optional<ApiError> ParsePrompts(const Json& body, const engine::Tokenizer& tokenizer,
                                     ApiRequest* request) {
  if (!body.contains("prompt") || body["prompt"].is_null())
    return BadRequest("prompt", "'prompt' is required");
  const Json& prompt = body["prompt"];
  const bool several =
      prompt.is_array() && !prompt.empty() && (prompt[0].is_string() || prompt[0].is_array());
  if (!several) return AddPrompt(prompt, "prompt", tokenizer, request);
  if (prompt.size() > kPromptsMax)
    return BadRequest("prompt", fmt::format("'prompt' may be a list of at most {} prompts", kPromptsMax));
  for (size_t i = 0; i < prompt.size(); ++i) {
    if (auto error = AddPrompt(prompt[i], fmt::format("prompt[{}]", i), tokenizer, request)) return error;
  }
  return std::nullopt;
}

// Keeps the last tokens of each prompt.
void Truncate(Fields& fields, const ModelInfo& model, ApiRequest* request) {
  int32_t keep = 0;
  fields.Integer("truncate_prompt_tokens", -1, INT32_MAX, &keep);
  if (fields.error() || !fields.Has("truncate_prompt_tokens")) return;
  if (keep == 0)
    return fields.Fail("truncate_prompt_tokens", "'truncate_prompt_tokens' must be -1 or at least 1");
  if (keep < 0) keep = model.context_max - 1;
  for (std::vector<int32_t>& prompt : request->prompts) {
    if (prompt.size() > static_cast<size_t>(keep)) prompt.erase(prompt.begin(), prompt.end() - keep);
  }
}

void ParseMaxTokens(Fields& fields, const ModelInfo& model, ApiRequest* request) {
  size_t longest = 0;
  for (const auto& each : request->prompts) longest = std::max(longest, each.size());
  const auto prompt = static_cast<int32_t>(longest);
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

engine::SamplingParams ApiRequest::SamplingOf(int32_t choice) const {
  engine::SamplingParams params = sampling;
  if (choice > 0) params.seed = Mix64(sampling.seed ^ Mix64(static_cast<uint64_t>(choice)));
  return params;
}

bool IsRequestId(std::string_view text) {
  return !text.empty() && text.size() <= 128 && std::all_of(text.begin(), text.end(), [](char c) {
    return std::isalnum(static_cast<unsigned char>(c)) || c == '-' || c == '_' || c == '.';
  });
}

ApiResult<Json> ParseBody(std::string_view text, const ModelInfo& model) {
  if (!IsUtf8(text)) return BadRequest("", "the request body is not valid UTF-8");
  auto parsed = ParseJson(text);
  if (!parsed.ok()) return BadRequest("", std::string(Message(parsed.status())));
  if (!parsed->is_object()) return BadRequest("", "the request body must be a JSON object");
  const auto model_name = GetString(*parsed, "model");
  if (!model_name.ok()) return BadRequest("model", std::string(Message(model_name.status())));
  if (model_name->has_value() && **model_name != model.name) {
    ApiError error = BadRequest("model", fmt::format("the model '{}' does not exist; this server serves '{}'",
                                                     **model_name, model.name));
    error.http_status = 404;
    error.code = "model_not_found";
    return error;
  }
  return *std::move(parsed);
}

ApiResult<RenderedPrompt> RenderPrompt(std::string_view text, const ModelInfo& model,
                                       const engine::Tokenizer& tokenizer) {
  // Tools and arguments are rendered back to text, so their keys keep the client's order.
  const auto ordered = ParseOrderedJson(text);
  if (!ordered.ok()) return BadRequest("", std::string(Message(ordered.status())));
  auto parsed = ParseChatRequest(*ordered);
  if (!parsed.ok()) return parsed.error();
  auto rendered = engine::RenderChat(model.chat_format, parsed->chat);
  if (!rendered.ok()) return BadRequest("messages", std::string(Message(rendered.status())));
  RenderedPrompt prompt;
  prompt.text = *std::move(rendered);
  // The answer goes on where the last message ends: its end-of-turn mark goes.
  constexpr std::string_view kTurnEnd = "<|role_end|>";
  if (parsed->continue_final_message && prompt.text.ends_with(kTurnEnd))
    prompt.text.erase(prompt.text.size() - kTurnEnd.size());
  auto ids = tokenizer.Encode(prompt.text);
  if (!ids.ok()) return BadRequest("messages", std::string(Message(ids.status())));
  prompt.ids = *std::move(ids);
  prompt.parser.thinking = parsed->chat.thinking;
  prompt.parser.tools = !parsed->chat.tools.empty();
  prompt.parser.single_tool_call = !parsed->parallel_tool_calls;
  prompt.has_tools = prompt.parser.tools;
  if (!parsed->required_tools.empty()) {
    prompt.tool_constraint =
        DumpJson(OrderedJson{{"type", "tool_calls"},
                             {"tools", parsed->required_tools},
                             {"single", parsed->named_tool || !parsed->parallel_tool_calls}});
  }
  return prompt;
}

ApiResult<ApiRequest> ParseApiRequest(Endpoint endpoint, std::string_view text, const ModelInfo& model,
                                      const engine::Tokenizer& tokenizer) {
  auto parsed = ParseBody(text, model);
  if (!parsed.ok()) return parsed.error();
  const Json& body = *parsed;
  if (auto refused = CheckRefused(endpoint, body)) return *refused;

  ApiRequest request;
  request.endpoint = endpoint;
  request.id = RandomName(endpoint == Endpoint::kChat ? "chatcmpl-" : "cmpl-");
  Fields fields(body);
  fields.Integer("n", 1, kNMax, &request.n);
  ParseSampling(fields, &request);
  ParseStop(fields, &request);
  ParseTokenLists(fields, tokenizer, &request);
  ParseLogprobs(fields, &request);
  ParseStreaming(fields, &request);
  CheckNames(fields, &request);
  fields.Integer("priority", -1000, 1000, &request.priority);
  fields.Bool("skip_special_tokens", &request.skip_special_tokens);
  fields.Bool("include_stop_str_in_output", &request.include_stop);
  fields.Bool("return_token_ids", &request.return_token_ids);
  bool adds_none = true;  // no tokenizer of this family has any to add
  fields.Bool("add_special_tokens", &adds_none);
  fields.Bool("include_reasoning", &request.include_reasoning);
  bool split_reasoning = true;
  fields.Bool("separate_reasoning", &split_reasoning);
  if (endpoint == Endpoint::kCompletions) fields.Bool("echo", &request.echo);
  request.sampling.prompt_logprobs = request.echo && request.sampling.num_logprobs >= 0;
  double timeout = 0;
  if (fields.Has("timeout")) {
    fields.Number("timeout", 0.001, 86400, &timeout);
    request.timeout_seconds = timeout;
  }
  if (fields.error()) return *fields.error();

  RenderedPrompt rendered;
  if (endpoint == Endpoint::kChat) {
    auto prompt = RenderPrompt(text, model, tokenizer);
    if (!prompt.ok()) return prompt.error();
    request.prompts.push_back(std::move(prompt->ids));
    request.parser = prompt->parser;
    rendered = *std::move(prompt);
    request.parser.split_reasoning = split_reasoning;
  } else {
    if (const auto error = ParsePrompts(body, tokenizer, &request)) return *error;
    request.parser.split_reasoning = false;
  }
  if (request.num_choices() > kChoicesMax)
    fields.Fail("n", fmt::format("{} prompts times n = {} is more than {} choices", request.prompts.size(),
                                 request.n, kChoicesMax));
  Truncate(fields, model, &request);
  ParseMaxTokens(fields, model, &request);
  if (fields.error()) {
    ApiError error = *fields.error();
    if (error.message.find("context") != std::string::npos) error.code = "context_length_exceeded";
    return error;
  }
  if (auto error = ParseConstraint(text, rendered, &request)) return *error;
  for (const auto& [key, value] : body.items()) {
    if (!IsKnown(key)) request.unknown_fields.push_back(key);
  }
  return request;
}

}  // namespace millrace::server
