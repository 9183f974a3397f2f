#include "server/gateway/structured_output.h"

#include <algorithm>
#include <mutex>
#include <string>
#include <vector>

#include "base/digest.h"
#include "engine/grammar/automaton.h"
#include "engine/grammar/constraint.h"

namespace millrace::server {
namespace {

struct Wanted {
  OrderedJson constraint;  // null: nothing is asked for
  std::string param;       // the field that asked
};

bool Present(const OrderedJson& object, const char* key) {
  return object.contains(key) && !object[key].is_null();
}

std::optional<ApiError> Take(OrderedJson constraint, const std::string& param, Wanted* wanted) {
  if (!wanted->constraint.is_null()) {
    return BadRequest(param, fmt::format("'{}' and '{}' exclude each other", param, wanted->param));
  }
  *wanted = {std::move(constraint), param};
  return std::nullopt;
}

std::optional<ApiError> FromResponseFormat(const OrderedJson& body, Wanted* wanted) {
  if (!Present(body, "response_format")) return std::nullopt;
  const OrderedJson& format = body["response_format"];
  if (!format.is_object() || !format.contains("type") || !format["type"].is_string())
    return BadRequest("response_format", "'response_format' must be an object with a 'type'");
  const auto type = format["type"].get<std::string>();
  if (type == "text") return std::nullopt;
  if (type == "json_object") return Take({{"type", "json_object"}}, "response_format", wanted);
  if (type != "json_schema") {
    return BadRequest("response_format.type",
                      "'response_format.type' must be 'text', 'json_object' or 'json_schema'");
  }
  const auto schema = format.find("json_schema");
  if (schema == format.end() || !schema->is_object() || !schema->contains("schema"))
    return BadRequest("response_format.json_schema", "'response_format.json_schema.schema' is required");
  return Take({{"type", "json_schema"}, {"schema", (*schema)["schema"]}}, "response_format", wanted);
}

// `name` of the value gives its kind: json, json_object, regex, choice, grammar.
std::optional<ApiError> FromValue(std::string_view name, const OrderedJson& value, const std::string& param,
                                  Wanted* wanted) {
  if (name == "json_object") {
    if (!value.is_boolean()) return BadRequest(param, fmt::format("'{}' must be true or false", param));
    return value.get<bool>() ? Take({{"type", "json_object"}}, param, wanted) : std::nullopt;
  }
  if (name == "json") {
    // A schema, or its text.
    OrderedJson schema = value;
    if (value.is_string()) {
      auto parsed = ParseOrderedJson(value.get_ref<const std::string&>());
      if (!parsed.ok()) return BadRequest(param, std::string(Message(parsed.status())));
      schema = *std::move(parsed);
    }
    return Take({{"type", "json_schema"}, {"schema", std::move(schema)}}, param, wanted);
  }
  if (name == "regex") return Take({{"type", "regex"}, {"pattern", value}}, param, wanted);
  if (name == "choice") return Take({{"type", "choice"}, {"choices", value}}, param, wanted);
  if (name == "grammar") return Take({{"type", "grammar"}, {"grammar", value}}, param, wanted);
  return BadRequest(param, fmt::format("'{}' is not supported by this server", param));
}

std::optional<ApiError> FromStructuredOutputs(const OrderedJson& body, Wanted* wanted) {
  if (Present(body, "structured_outputs")) {
    const OrderedJson& outputs = body["structured_outputs"];
    if (!outputs.is_object())
      return BadRequest("structured_outputs", "'structured_outputs' must be an object");
    for (const auto& [key, value] : outputs.items()) {
      if (value.is_null()) continue;
      if (auto error = FromValue(key, value, "structured_outputs." + key, wanted)) return error;
    }
  }
  for (const char* key : {"json", "regex", "choice", "grammar"}) {
    const std::string param = std::string("guided_") + key;
    if (!Present(body, param.c_str())) continue;
    if (auto error = FromValue(key, body[param], param, wanted)) return error;
  }
  return std::nullopt;
}

// The digests of the constraints that were found good last. Compiling one takes up to some tenths of a
// second, and clients send the same one with every request; workers keep what they compiled themselves.
// Thread-safe.
class KnownGood {
 public:
  bool Has(const std::string& digest) {
    const std::lock_guard lock(mutex_);
    const auto found = std::find(digests_.begin(), digests_.end(), digest);
    if (found == digests_.end()) return false;
    std::rotate(found, found + 1, digests_.end());
    return true;
  }
  void Add(std::string digest) {
    const std::lock_guard lock(mutex_);
    if (digests_.size() >= kKept) digests_.erase(digests_.begin());
    digests_.push_back(std::move(digest));
  }

 private:
  static constexpr size_t kKept = 256;
  std::mutex mutex_;
  std::vector<std::string> digests_;  // last used last
};

Status CheckConstraint(const std::string& constraint) {
  static KnownGood known;
  std::string digest = Xxh3Hex(AsBytes(constraint));
  if (known.Has(digest)) return OkStatus();
  MR_ASSIGN_OR_RETURN(const engine::Grammar grammar, engine::BuildGrammar(constraint));
  MR_RETURN_IF_ERROR(engine::Automaton::Build(grammar).status());
  known.Add(std::move(digest));
  return OkStatus();
}

}  // namespace

std::optional<ApiError> ParseConstraint(std::string_view text, const RenderedPrompt& prompt,
                                        ApiRequest* request) {
  const auto body = ParseOrderedJson(text);
  if (!body.ok()) return BadRequest("", std::string(Message(body.status())));
  Wanted wanted;
  if (auto error = FromResponseFormat(*body, &wanted)) return error;
  if (auto error = FromStructuredOutputs(*body, &wanted)) return error;
  if (!prompt.tool_constraint.empty()) {
    if (!wanted.constraint.is_null()) {
      return BadRequest(wanted.param,
                        fmt::format("'{}' and a forced 'tool_choice' exclude each other", wanted.param));
    }
    wanted = {*ParseOrderedJson(prompt.tool_constraint), "tools"};
  }
  if (wanted.constraint.is_null()) return std::nullopt;
  if (prompt.has_tools && prompt.tool_constraint.empty()) {
    return BadRequest(
        wanted.param,
        fmt::format("'{}' with tools needs 'tool_choice': 'none': the model could not call them",
                    wanted.param));
  }
  if (request->sampling.ignore_eos || request->sampling.min_tokens > 0) {
    return BadRequest(
        wanted.param,
        fmt::format("'{}' says where the answer ends: ignore_eos and min_tokens exclude it", wanted.param));
  }
  if (request->parser.thinking) wanted.constraint["thinking"] = true;  // it holds for what comes after
  request->sampling.constraint = DumpJson(wanted.constraint);
  const Status good = CheckConstraint(request->sampling.constraint);
  if (!good.ok()) return BadRequest(wanted.param, std::string(Message(good)));
  return std::nullopt;
}

}  // namespace millrace::server
