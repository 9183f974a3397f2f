#include "server/bench/answer_meter.h"

#include <algorithm>
#include <optional>

namespace millrace::server {
namespace {

constexpr size_t kMessageBytesMax = 200;

std::string Text(const Json& object, const char* key) {
  const auto found = object.find(key);
  return found != object.end() && found->is_string() ? found->get<std::string>() : std::string();
}

// The part of a choice that holds its content: "delta" or "message" in a chat, the choice itself in a
// completion.
const Json& Content(const Json& choice) {
  for (const char* key : {"delta", "message"}) {
    const auto found = choice.find(key);
    if (found != choice.end() && found->is_object()) return *found;
  }
  return choice;
}

// Anything that a token made: text, reasoning under either name, a tool call.
bool HasToken(const Json& content) {
  if (!Text(content, "content").empty() || !Text(content, "text").empty() ||
      !Text(content, "reasoning").empty() || !Text(content, "reasoning_content").empty()) {
    return true;
  }
  const auto calls = content.find("tool_calls");
  return calls != content.end() && calls->is_array() && !calls->empty();
}

std::optional<int32_t> Count(const Json& object, const char* key) {
  const auto value =
      object.is_object() ? GetInt(object, key) : StatusOr<std::optional<int64_t>>(std::nullopt);
  if (!value.ok() || !value->has_value() || **value < 0 || **value > INT32_MAX) return std::nullopt;
  return static_cast<int32_t>(**value);
}

}  // namespace

const char* ErrorName(RequestError error) {
  static constexpr const char* kNames[kNumRequestErrors] = {"none",   "connect",   "http",    "server",
                                                            "broken", "malformed", "timeout", "unfinished"};
  return kNames[static_cast<int>(error)];
}

std::string ErrorMessage(std::string_view body) {
  const auto parsed = ParseJson(body);
  if (parsed.ok() && parsed->is_object()) {
    const auto error = parsed->find("error");
    if (error != parsed->end() && error->is_object()) {
      if (const std::string message = Text(*error, "message"); !message.empty()) return message;
    }
    if (const std::string message = Text(*parsed, "message"); !message.empty()) return message;
  }
  return std::string(body.substr(0, kMessageBytesMax));
}

void AnswerMeter::Fail(RequestError error, std::string message) {
  if (failed()) return;
  result_->error = error;
  result_->message = std::move(message);
}

void AnswerMeter::Add(std::string_view bytes, TimePoint now) {
  pending_ += bytes;
  if (!is_stream_) return;
  size_t begin = 0;
  for (size_t end; (end = pending_.find('\n', begin)) != std::string::npos; begin = end + 1) {
    std::string_view line(pending_.data() + begin, end - begin);
    if (line.ends_with('\r')) line.remove_suffix(1);
    if (!line.starts_with("data:")) continue;  // comments, event names, blank lines
    line.remove_prefix(5);
    if (line.starts_with(' ')) line.remove_prefix(1);
    OnData(line, now);
  }
  pending_.erase(0, begin);
}

void AnswerMeter::OnData(std::string_view data, TimePoint now) {
  if (failed() || done_) return;
  if (data == "[DONE]") {
    done_ = true;
    result_->end = now;
    return;
  }
  const auto chunk = ParseJson(data);
  if (!chunk.ok() || !chunk->is_object()) {
    return Fail(RequestError::kMalformed,
                fmt::format("an event that is no JSON object: {}", data.substr(0, 80)));
  }
  OnChunk(*chunk, now);
}

void AnswerMeter::OnChunk(const Json& chunk, TimePoint now) {
  if (const auto error = chunk.find("error"); error != chunk.end() && !error->is_null()) {
    return Fail(RequestError::kServer, ErrorMessage(DumpJson(chunk)));
  }
  bool has_token = false;
  const auto choices = chunk.find("choices");
  if (choices != chunk.end() && choices->is_array()) {
    for (const Json& choice : *choices) {
      if (!choice.is_object()) continue;
      const Json& content = Content(choice);
      has_token = has_token || HasToken(content);
      text_ += Text(content, "content");
      text_ += Text(content, "text");
      if (const std::string reason = Text(choice, "finish_reason"); !reason.empty())
        result_->finish_reason = reason;
    }
  }
  const auto usage = chunk.find("usage");
  if (usage == chunk.end() || !usage->is_object()) return Tokens(has_token ? 1 : 0, now);
  ReadUsage(*usage);
  // A usage beside choices counts what came so far; one without choices sums up at the end.
  if (choices == chunk.end() || !choices->is_array() || choices->empty()) return;
  result_->tokens_per_chunk = true;
  Tokens(result_->output_tokens - counted_, now);
}

// `count` tokens came together: the time since the one before is shared among them.
void AnswerMeter::Tokens(int32_t count, TimePoint now) {
  if (count <= 0) return;
  if (counted_ == 0) {
    result_->first = now;
  } else {
    const int64_t gap = (now - last_).count() / count;
    result_->gaps_ns.insert(result_->gaps_ns.end(), static_cast<size_t>(count), gap);
  }
  counted_ += count;
  last_ = now;
}

void AnswerMeter::TokensSoFar(int32_t count, TimePoint now) {
  result_->output_tokens = count;
  result_->tokens_from_usage = true;
  if (!is_stream_) {
    result_->first = now;  // nothing was to be seen before
    return;
  }
  result_->tokens_per_chunk = true;
  Tokens(count - counted_, now);
}

void AnswerMeter::ReadUsage(const Json& usage) {
  if (const auto tokens = Count(usage, "completion_tokens"); tokens.has_value()) {
    result_->output_tokens = *tokens;
    result_->tokens_from_usage = true;
  }
  if (const auto tokens = Count(usage, "prompt_tokens"); tokens.has_value()) result_->prompt_tokens = *tokens;
  const auto details = usage.find("prompt_tokens_details");
  if (details == usage.end()) return;
  if (const auto tokens = Count(*details, "cached_tokens"); tokens.has_value())
    result_->cached_tokens = *tokens;
}

void AnswerMeter::OnWhole(TimePoint now) {
  const auto body = ParseJson(pending_);
  if (!body.ok() || !body->is_object()) return Fail(RequestError::kMalformed, "the answer is no JSON object");
  const auto choices = body->find("choices");
  if (choices == body->end() || !choices->is_array() || choices->empty() || !choices->front().is_object()) {
    return Fail(RequestError::kMalformed, "the answer has no choices");
  }
  const Json& content = Content(choices->front());
  text_ = Text(content, "content") + Text(content, "text");
  result_->finish_reason = Text(choices->front(), "finish_reason");
  if (const auto usage = body->find("usage"); usage != body->end() && usage->is_object()) ReadUsage(*usage);
  result_->first = now;  // nothing was to be seen before
}

void AnswerMeter::End(bool whole, TimePoint now) {
  if (failed()) {
    result_->end = now;
    return;
  }
  if (!is_stream_ && whole) {
    OnWhole(now);
    done_ = true;
    result_->end = now;
  }
  if (!done_) {
    result_->end = now;
    return Fail(RequestError::kBroken, "the connection ended before the answer did");
  }
  if (!result_->tokens_from_usage) result_->output_tokens = counted_;
}

}  // namespace millrace::server
