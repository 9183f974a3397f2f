// engine_probe: the engine's parts behind JSON lines, so that a test in any language can compare them with a
// reference. One request object per line of standard input, one answer object per line of standard output, in
// order. Every answer has "ok"; a failure has "code" and "error" and changes nothing. Requests, by "op":
//
//   load        directory [backend ("cpu" or "cuda") precision quantize weight_cache isa threads num_pages
//               batch_tokens_max logit_rows_max]
//               -> describe digest unused num_layers num_mtp_layers num_kv_layers vocab_size max_position
//               eos_token_ids
//   forward     segments: [{tokens position [num_logits pages next_tokens]}]
//               -> logits mtp_logits (a list per row) layers (in the order in which their KV was done)
//                  router (layer -> per row, the chosen experts in order of choice; the MTP layer is the
//                  last; CPU only) num_logits is 1 and pages are 0, 1, 2... when left out
//   reset       -> KV memory zeroed
//   load_tokenizer  directory -> size chat_format
//   tokenize    text [parse_special] -> ids
//   detokenize  ids [skip_special] -> text (streamed), pieces (per id, then the rest), hex (the bytes)
//   render      messages [tools add_generation_prompt thinking format ("v1" or "v2")] -> text

#include <algorithm>
#include <iostream>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "base/json.h"
#include "base/log.h"
#include "engine/backend/cpu/cpu_backend.h"
#include "engine/backend/cuda/cuda_backend.h"
#include "engine/model/checkpoint.h"
#include "engine/model/config.h"
#include "engine/tokenizer/chat_format.h"
#include "engine/tokenizer/tokenizer.h"

namespace millrace::engine {
namespace {

StatusOr<std::string> NeedString(const Json& object, const std::string& key) {
  MR_ASSIGN_OR_RETURN(const std::optional<std::string> value, GetString(object, key));
  if (!value) return InvalidArgument("'{}' is missing", key);
  return *value;
}

StatusOr<int32_t> IntOr(const Json& object, const std::string& key, int32_t absent) {
  MR_ASSIGN_OR_RETURN(const std::optional<int64_t> value, GetInt(object, key));
  if (value && (*value < INT32_MIN || *value > INT32_MAX))
    return InvalidArgument("'{}' is out of range", key);
  return static_cast<int32_t>(value.value_or(absent));
}

StatusOr<std::vector<int32_t>> Ints(const Json& object, const std::string& key) {
  std::vector<int32_t> values;
  const auto found = object.find(key);
  if (found == object.end() || found->is_null()) return values;
  if (!found->is_array()) return InvalidArgument("'{}' must be a list", key);
  for (const Json& item : *found) {
    if (!item.is_number_integer() || item < INT32_MIN || item > INT32_MAX) {
      return InvalidArgument("'{}' must be a list of 32-bit integers", key);
    }
    values.push_back(item.get<int32_t>());
  }
  return values;
}

Json Rows(std::span<const float> values, int32_t width) {
  Json rows = Json::array();
  for (size_t at = 0; at < values.size(); at += static_cast<size_t>(width)) {
    const std::span<const float> row = values.subspan(at, static_cast<size_t>(width));
    rows.push_back(Json(std::vector<float>(row.begin(), row.end())));
  }
  return rows;
}

StatusOr<std::vector<ToolCall>> ReadToolCalls(const OrderedJson& calls) {
  std::vector<ToolCall> result;
  if (calls.is_null()) return result;
  if (!calls.is_array()) return InvalidArgument("'tool_calls' must be a list");
  for (const OrderedJson& item : calls) {
    if (!item.is_object()) return InvalidArgument("'tool_calls' must be a list of objects");
    const OrderedJson call = item.contains("function") ? item["function"] : item;
    if (!call.is_object() || !call.contains("name") || !call["name"].is_string() ||
        !call.contains("arguments")) {
      return InvalidArgument("a tool call needs 'name' and 'arguments'");
    }
    ToolCall read;
    read.name = call["name"].get<std::string>();
    read.arguments = call["arguments"];
    result.push_back(std::move(read));
  }
  return result;
}

StatusOr<ChatMessage> ReadMessage(const OrderedJson& json) {
  ChatMessage message;
  for (const auto& item : json.items()) {
    const OrderedJson& value = item.value();
    if (item.key() == "tool_calls") {
      MR_ASSIGN_OR_RETURN(message.tool_calls, ReadToolCalls(value));
      continue;
    }
    if (value.is_null()) continue;
    if (!value.is_string()) return InvalidArgument("messages: '{}' must be a string", item.key());
    const std::string text = value.get<std::string>();
    if (item.key() == "role") {
      message.role = text;
    } else if (item.key() == "content") {
      message.content = text;
    } else if (item.key() == "reasoning_content") {
      message.reasoning_content = text;
    } else if (item.key() == "tool_call_id") {
      message.tool_call_id = text;
    } else {
      return InvalidArgument("messages: unknown field '{}'", item.key());
    }
  }
  return message;
}

class Probe {
 public:
  // `ordered` is the same request with its keys in the order in which they came.
  StatusOr<Json> Answer(const Json& request, const OrderedJson& ordered) {
    MR_ASSIGN_OR_RETURN(const std::string op, NeedString(request, "op"));
    if (op == "load") return Load(request);
    if (op == "forward") return Forward(request);
    if (op == "reset") return Reset();
    if (op == "load_tokenizer") return LoadTokenizer(request);
    if (op == "tokenize") return Tokenize(request);
    if (op == "detokenize") return Detokenize(request);
    if (op == "render") return Render(request, ordered);
    return InvalidArgument("unknown op '{}'", op);
  }

 private:
  StatusOr<Json> Load(const Json& request) {
    MR_ASSIGN_OR_RETURN(const std::string directory, NeedString(request, "directory"));
    MR_ASSIGN_OR_RETURN(const std::optional<std::string> precision, GetString(request, "precision"));
    MR_ASSIGN_OR_RETURN(const std::optional<std::string> isa, GetString(request, "isa"));
    MR_ASSIGN_OR_RETURN(const std::optional<std::string> quantize, GetString(request, "quantize"));
    MR_ASSIGN_OR_RETURN(const std::optional<std::string> cache, GetString(request, "weight_cache"));
    CpuWeightsOptions weights_options;
    CpuBackendOptions options;
    MR_ASSIGN_OR_RETURN(weights_options.precision, ParsePrecision(precision.value_or("float32")));
    MR_ASSIGN_OR_RETURN(weights_options.quantization, ParseQuantization(quantize.value_or("none")));
    MR_ASSIGN_OR_RETURN(options.isa, ParseIsa(isa.value_or("auto")));
    MR_ASSIGN_OR_RETURN(options.num_threads, IntOr(request, "threads", 1));
    MR_ASSIGN_OR_RETURN(options.num_pages, IntOr(request, "num_pages", 64));
    MR_ASSIGN_OR_RETURN(options.batch_tokens_max,
                        IntOr(request, "batch_tokens_max", options.batch_tokens_max));
    MR_ASSIGN_OR_RETURN(options.logit_rows_max, IntOr(request, "logit_rows_max", options.batch_tokens_max));
    options.with_mtp = true;
    weights_options.num_threads = options.num_threads;

    MR_ASSIGN_OR_RETURN(ModelConfig config, LoadModelConfig(directory));
    MR_ASSIGN_OR_RETURN(const std::unique_ptr<Checkpoint> checkpoint, Checkpoint::Open(directory));
    std::vector<std::string> unused;
    MR_RETURN_IF_ERROR(CheckTensors(*checkpoint, &config, &unused));
    const std::string digest = ModelDigest(*checkpoint, config);
    weights_options.cache_directory = cache.value_or("");
    weights_options.source_digest = digest + checkpoint->files_identity();
    MR_ASSIGN_OR_RETURN(const std::optional<std::string> backend, GetString(request, "backend"));
    if (backend.value_or("cpu") == "cuda") {
      CudaBackendOptions cuda;
      cuda.num_pages = options.num_pages;
      cuda.batch_tokens_max = options.batch_tokens_max;
      cuda.logit_rows_max = options.logit_rows_max;
      cuda.with_mtp = true;
      MR_ASSIGN_OR_RETURN(std::shared_ptr<const Weights> weights, LoadCudaWeights(*checkpoint, config, {}));
      MR_ASSIGN_OR_RETURN(backend_, MakeCudaBackend(std::move(weights), cuda));
    } else {
      MR_ASSIGN_OR_RETURN(std::shared_ptr<const Weights> weights,
                          LoadCpuWeights(*checkpoint, config, weights_options));
      MR_ASSIGN_OR_RETURN(backend_, MakeCpuBackend(std::move(weights), options));
      SetRouterTrace(*backend_, [this](int32_t layer, int32_t, std::span<const int32_t> experts) {
        router_[std::to_string(layer)].push_back(experts);
      });
    }
    return Json{{"describe", backend_->Describe()},
                {"digest", digest},
                {"unused", unused},
                {"num_layers", config.num_layers},
                {"num_mtp_layers", config.num_mtp_layers},
                {"num_kv_layers", config.num_kv_layers()},
                {"vocab_size", config.vocab_size},
                {"max_position", config.max_position},
                {"eos_token_ids", config.eos_token_ids}};
  }

  // The numbers that a Segment only points to.
  struct OwnedSegment {
    std::vector<int32_t> tokens;
    std::vector<int32_t> pages;
    std::vector<int32_t> next_tokens;
    int32_t position = 0;
    int32_t num_logits = 0;
  };

  StatusOr<OwnedSegment> ReadSegment(const Json& json) const {
    OwnedSegment segment;
    MR_ASSIGN_OR_RETURN(segment.tokens, Ints(json, "tokens"));
    MR_ASSIGN_OR_RETURN(segment.pages, Ints(json, "pages"));
    MR_ASSIGN_OR_RETURN(segment.next_tokens, Ints(json, "next_tokens"));
    MR_ASSIGN_OR_RETURN(segment.position, IntOr(json, "position", 0));
    MR_ASSIGN_OR_RETURN(segment.num_logits, IntOr(json, "num_logits", 1));
    const int64_t tokens = static_cast<int64_t>(segment.tokens.size());
    if (tokens == 0 || segment.position < 0 || segment.num_logits < 0 || segment.num_logits > tokens) {
      return InvalidArgument(
          "a segment needs tokens, a position from 0 on, and no more num_logits than tokens");
    }
    if (!segment.next_tokens.empty() && segment.next_tokens.size() != segment.tokens.size()) {
      return InvalidArgument("'next_tokens' must be as long as 'tokens'");
    }
    const int64_t end = segment.position + tokens;
    if (end > int64_t{kPageTokens} * backend_->kv_layout().num_pages) {
      return InvalidArgument("a segment ends at {}, beyond every page there is", end);
    }
    if (segment.pages.empty()) {
      for (int32_t page = 0; page < PagesFor(end); ++page) segment.pages.push_back(page);
    }
    if (static_cast<int64_t>(segment.pages.size()) < PagesFor(end)) {
      return InvalidArgument("'pages' do not cover the segment");
    }
    const auto within = [](const std::vector<int32_t>& values, int32_t bound) {
      return std::all_of(values.begin(), values.end(),
                         [bound](int32_t value) { return value >= 0 && value < bound; });
    };
    const int32_t vocab = backend_->config().vocab_size;
    if (!within(segment.tokens, vocab) || !within(segment.next_tokens, vocab)) {
      return InvalidArgument("a token is outside the vocabulary");
    }
    if (!within(segment.pages, backend_->kv_layout().num_pages))
      return InvalidArgument("there is no such page");
    return segment;
  }

  StatusOr<Json> Forward(const Json& request) {
    if (backend_ == nullptr) return FailedPrecondition("no model is loaded");
    if (!request.contains("segments") || !request["segments"].is_array()) {
      return InvalidArgument("'segments' must be a list");
    }
    std::vector<OwnedSegment> owned;
    for (const Json& json : request["segments"]) {
      if (!json.is_object()) return InvalidArgument("'segments' must be a list of objects");
      MR_ASSIGN_OR_RETURN(OwnedSegment segment, ReadSegment(json));
      owned.push_back(std::move(segment));
    }
    Batch batch;
    for (const OwnedSegment& segment : owned) {
      batch.segments.push_back(
          {segment.tokens, segment.position, segment.pages, segment.num_logits, segment.next_tokens});
    }
    std::vector<int32_t> layers;
    router_ = Json::object();
    MR_ASSIGN_OR_RETURN(const StepOutput output,
                        backend_->Forward(batch, [&layers](int32_t layer) { layers.push_back(layer); }));
    const int32_t width = backend_->config().vocab_size;
    return Json{{"logits", Rows(output.logits, width)},
                {"mtp_logits", Rows(output.mtp_logits, width)},
                {"layers", layers},
                {"router", router_}};
  }

  StatusOr<Json> Reset() {
    if (backend_ == nullptr) return FailedPrecondition("no model is loaded");
    const std::span<std::byte> memory = backend_->kv_memory();
    std::fill(memory.begin(), memory.end(), std::byte{0});
    return Json::object();
  }

  StatusOr<Json> LoadTokenizer(const Json& request) {
    MR_ASSIGN_OR_RETURN(const std::string directory, NeedString(request, "directory"));
    MR_ASSIGN_OR_RETURN(const ModelConfig config, LoadModelConfig(directory));
    MR_ASSIGN_OR_RETURN(std::unique_ptr<Tokenizer> tokenizer, Tokenizer::Load(directory));
    MR_ASSIGN_OR_RETURN(format_, DetectChatFormat(directory, config.architecture == Architecture::kLingV2));
    tokenizer_ = std::move(tokenizer);
    return Json{{"size", tokenizer_->size()},
                {"chat_format", format_ == ChatFormatKind::kLingV2 ? "v2" : "v1"}};
  }

  StatusOr<Json> Tokenize(const Json& request) {
    if (tokenizer_ == nullptr) return FailedPrecondition("no tokenizer is loaded");
    MR_ASSIGN_OR_RETURN(const std::string text, NeedString(request, "text"));
    MR_ASSIGN_OR_RETURN(const std::optional<bool> parse_special, GetBool(request, "parse_special"));
    MR_ASSIGN_OR_RETURN(const std::vector<TokenId> ids,
                        tokenizer_->Encode(text, parse_special.value_or(true)));
    return Json{{"ids", ids}};
  }

  StatusOr<Json> Detokenize(const Json& request) {
    if (tokenizer_ == nullptr) return FailedPrecondition("no tokenizer is loaded");
    MR_ASSIGN_OR_RETURN(const std::vector<int32_t> ids, Ints(request, "ids"));
    MR_ASSIGN_OR_RETURN(const std::optional<bool> skip, GetBool(request, "skip_special"));
    Detokenizer stream(*tokenizer_, skip.value_or(false));
    std::vector<std::string> pieces;
    for (const int32_t id : ids) pieces.push_back(stream.Push(id));
    pieces.push_back(stream.Finish());
    std::string text, hex;
    for (const std::string& piece : pieces) text += piece;
    for (const char c : tokenizer_->Decode(ids, skip.value_or(false))) {
      hex += fmt::format("{:02x}", static_cast<unsigned char>(c));
    }
    return Json{{"text", text}, {"pieces", pieces}, {"hex", hex}};
  }

  StatusOr<Json> Render(const Json& request, const OrderedJson& ordered) {
    MR_ASSIGN_OR_RETURN(const std::optional<std::string> format, GetString(request, "format"));
    MR_ASSIGN_OR_RETURN(const std::optional<bool> generate, GetBool(request, "add_generation_prompt"));
    MR_ASSIGN_OR_RETURN(const std::optional<bool> thinking, GetBool(request, "thinking"));
    if (format && *format != "v1" && *format != "v2")
      return InvalidArgument("'format' must be \"v1\" or \"v2\"");
    ChatFormatKind kind = format_;
    if (format) kind = *format == "v2" ? ChatFormatKind::kLingV2 : ChatFormatKind::kLingV1;
    if (!ordered.contains("messages") || !ordered["messages"].is_array()) {
      return InvalidArgument("'messages' must be a list");
    }
    ChatRequest chat;
    for (const OrderedJson& item : ordered["messages"]) {
      if (!item.is_object()) return InvalidArgument("'messages' must be a list of objects");
      MR_ASSIGN_OR_RETURN(ChatMessage message, ReadMessage(item));
      chat.messages.push_back(std::move(message));
    }
    if (ordered.contains("tools") && ordered["tools"].is_array()) {
      chat.tools.assign(ordered["tools"].begin(), ordered["tools"].end());
    }
    chat.add_generation_prompt = generate.value_or(true);
    chat.thinking = thinking.value_or(false);
    MR_ASSIGN_OR_RETURN(const std::string text, RenderChat(kind, chat));
    return Json{{"text", text}};
  }

  Json router_;  // of the last forward: layer -> per row, the chosen experts
  std::unique_ptr<Backend> backend_;
  std::unique_ptr<Tokenizer> tokenizer_;
  ChatFormatKind format_ = ChatFormatKind::kLingV2;
};

StatusOr<Json> AnswerLine(Probe& probe, const std::string& line) {
  MR_ASSIGN_OR_RETURN(const Json request, ParseJson(line));
  MR_ASSIGN_OR_RETURN(const OrderedJson ordered, ParseOrderedJson(line));
  if (!request.is_object()) return InvalidArgument("a request must be an object");
  return probe.Answer(request, ordered);
}

}  // namespace
}  // namespace millrace::engine

int main() {
  millrace::LogOptions log;
  log.level = "warn";
  if (!millrace::ConfigureLog(log).ok()) return 1;  // stderr: stdout is for answers
  millrace::engine::Probe probe;
  std::string line;
  while (std::getline(std::cin, line)) {
    if (line.empty()) continue;
    millrace::StatusOr<millrace::Json> answer = millrace::engine::AnswerLine(probe, line);
    if (answer.ok()) {
      (*answer)["ok"] = true;
    } else {
      answer = millrace::Json{{"ok", false},
                              {"code", absl::StatusCodeToString(answer.status().code())},
                              {"error", std::string(millrace::Message(answer.status()))}};
    }
    std::cout << millrace::DumpJson(*answer) << std::endl;  // flushed: the other side waits for it
  }
  return 0;
}
