#include "server/gateway/answer_parser.h"

#include <algorithm>
#include <string_view>

#include "base/json.h"
#include "base/random.h"

namespace millrace::server {
namespace {

constexpr std::string_view kThinkOpen = "<think>";
constexpr std::string_view kThinkClose = "</think>";
constexpr std::string_view kCallOpen = "<tool_call>";
constexpr std::string_view kCallClose = "</tool_call>";

bool IsSpace(char c) { return c == ' ' || c == '\n' || c == '\t' || c == '\r'; }

// Length of the longest tail of `text` that is a proper beginning of `tag`.
size_t PartialTag(std::string_view text, std::string_view tag) {
  for (size_t length = std::min(tag.size() - 1, text.size()); length > 0; --length) {
    if (text.substr(text.size() - length) == tag.substr(0, length)) return length;
  }
  return 0;
}

// How much of `text` may go out when newlines before `tag` belong to the tag.
size_t Certain(std::string_view text, std::string_view tag) {
  size_t end = text.size() - PartialTag(text, tag);
  while (end > 0 && text[end - 1] == '\n') --end;
  return end;
}

void StripSpaceLeft(std::string* text) {
  text->erase(0, static_cast<size_t>(std::find_if_not(text->begin(), text->end(), IsSpace) - text->begin()));
}

void StripNewlinesRight(std::string* text) {
  while (!text->empty() && text->back() == '\n') text->pop_back();
}

}  // namespace

bool ToolCallReader::Push(char byte, std::vector<ToolCallDelta>* out) {
  if (state_ == State::kBroken || !Step(byte)) {
    state_ = State::kBroken;
    return false;
  }
  if (!name_) return true;
  if (!announced_) {
    announced_ = true;
    out->push_back({index_, RandomName("call_"), *name_, ""});
  }
  // A call without arguments has an empty object, or clients could not parse it.
  if (state_ == State::kAfter && !arguments_seen_) {
    arguments_ = "{}";
    arguments_seen_ = true;
  }
  if (!arguments_.empty()) out->push_back({index_, "", "", std::exchange(arguments_, {})});
  return true;
}

bool ToolCallReader::Step(char byte) {
  switch (state_) {
    case State::kBefore:
      if (IsSpace(byte)) return true;
      state_ = State::kKeyOrEnd;
      return byte == '{';
    case State::kKeyOrEnd:
      if (IsSpace(byte)) return true;
      if (byte == '}' && name_) {
        state_ = State::kAfter;
        return true;
      }
      state_ = State::kKey;
      value_ = byte;
      return byte == '"';
    case State::kKey:
      value_ += byte;
      if (escaped_) {
        escaped_ = false;
      } else if (byte == '\\') {
        escaped_ = true;
      } else if (byte == '"') {
        const auto key = ParseJson(value_);
        if (!key.ok()) return false;
        key_ = key->get<std::string>();
        state_ = State::kColon;
      }
      return true;
    case State::kColon:
      if (IsSpace(byte)) return true;
      state_ = State::kValue;
      value_.clear();
      depth_ = -1;  // the value has not begun
      return byte == ':';
    case State::kValue:
      if (depth_ < 0) return IsSpace(byte) || BeginValue(byte);
      return StepValue(byte);
    case State::kCommaOrEnd:
      if (IsSpace(byte)) return true;
      if (byte == ',') {
        state_ = State::kKeyOrEnd;
        return true;
      }
      state_ = State::kAfter;
      return byte == '}' && name_.has_value();
    case State::kAfter:
      return IsSpace(byte);
    case State::kBroken:
      return false;
  }
  return false;
}

bool ToolCallReader::BeginValue(char byte) {
  depth_ = 0;
  in_string_ = false;
  escaped_ = false;
  const bool arguments = key_ == "arguments" || key_ == "parameters";
  if (key_ == "name" && byte != '"') return false;
  if (arguments && (arguments_seen_ || (byte != '{' && byte != '"'))) return false;
  // Arguments inside a JSON string are read whole and unescaped.
  is_arguments_ = arguments && byte == '{';
  return StepValue(byte);
}

bool ToolCallReader::StepValue(char byte) {
  const bool scalar = !in_string_ && depth_ == 0 && !value_.empty() && value_.front() != '"';
  if (scalar && (byte == ',' || byte == '}' || IsSpace(byte))) {  // the end of a number, true, false or null
    EndValue();
    return state_ != State::kBroken && Step(byte);
  }
  value_ += byte;
  if (is_arguments_) arguments_ += byte;
  if (in_string_) {
    if (escaped_) {
      escaped_ = false;
    } else if (byte == '\\') {
      escaped_ = true;
    } else if (byte == '"') {
      in_string_ = false;
      if (depth_ == 0) EndValue();
    }
    return state_ != State::kBroken;
  }
  if (byte == '"') in_string_ = true;
  if (byte == '{' || byte == '[') ++depth_;
  if (byte == '}' || byte == ']') {
    if (depth_ == 0) return false;
    if (--depth_ == 0) EndValue();
  }
  return state_ != State::kBroken;
}

void ToolCallReader::EndValue() {
  state_ = State::kCommaOrEnd;
  if (is_arguments_) {
    is_arguments_ = false;
    arguments_seen_ = true;
  } else if (key_ == "name" || key_ == "arguments" || key_ == "parameters") {
    const auto value = ParseJson(value_);
    if (!value.ok() || !value->is_string() ||
        (key_ == "name" && value->get_ref<const std::string&>().empty())) {
      state_ = State::kBroken;
    } else if (key_ == "name") {
      name_ = value->get<std::string>();
    } else {
      arguments_ = value->get<std::string>();
      arguments_seen_ = true;
    }
  }
  value_.clear();
}

AnswerParser::AnswerParser(const AnswerParserOptions& options)
    : options_(options), state_(options.split_reasoning ? State::kStart : State::kContent) {}

AnswerDelta AnswerParser::Push(const std::string& text) {
  AnswerDelta delta;
  held_ += text;
  while (Advance(false, &delta)) {
  }
  return delta;
}

AnswerDelta AnswerParser::Finish() {
  AnswerDelta delta;
  while (Advance(true, &delta)) {
  }
  return delta;
}

bool AnswerParser::Advance(bool final, AnswerDelta* delta) {
  switch (state_) {
    case State::kStart:
      return AdvanceStart(final);
    case State::kReasoning:
      return AdvanceReasoning(final, delta);
    case State::kBetween:
      StripSpaceLeft(&held_);
      if (held_.empty()) return false;
      state_ = State::kContent;
      return true;
    case State::kContent:
      return AdvanceContent(final, delta);
    case State::kToolCall:
      return AdvanceToolCall(final, delta);
    case State::kNoCall:
      return AdvanceNoCall(final, delta);
  }
  return false;
}

// Is there a <think>? White space before it belongs to it.
bool AnswerParser::AdvanceStart(bool final) {
  std::string text = held_;
  StripSpaceLeft(&text);
  if (text.starts_with(kThinkOpen)) {
    held_ = text.substr(kThinkOpen.size());
    state_ = State::kReasoning;
    return true;
  }
  if (held_.empty() || (!final && kThinkOpen.starts_with(text))) return false;
  state_ = options_.thinking ? State::kReasoning : State::kContent;
  return true;
}

bool AnswerParser::AdvanceReasoning(bool final, AnswerDelta* delta) {
  if (!reasoning_begun_) StripSpaceLeft(&held_);
  const size_t close = held_.find(kThinkClose);
  const bool ends = final || close != std::string::npos;
  const size_t certain = close != std::string::npos ? close
                         : final                    ? held_.size()
                                                    : Certain(held_, kThinkClose);
  std::string text = held_.substr(0, certain);
  if (ends) StripNewlinesRight(&text);
  reasoning_begun_ = reasoning_begun_ || !text.empty();
  delta->reasoning += text;
  held_.erase(0, certain);
  if (close == std::string::npos) return false;
  held_.erase(0, kThinkClose.size());
  state_ = State::kBetween;
  return true;
}

bool AnswerParser::AdvanceContent(bool final, AnswerDelta* delta) {
  const size_t open = options_.tools ? held_.find(kCallOpen) : std::string::npos;
  if (open == std::string::npos) {
    const size_t certain = final || !options_.tools ? held_.size() : Certain(held_, kCallOpen);
    delta->content += held_.substr(0, certain);
    held_.erase(0, certain);
    return false;
  }
  std::string text = held_.substr(0, open);
  StripNewlinesRight(&text);
  delta->content += text;
  held_.erase(0, open + kCallOpen.size());
  reader_.emplace(num_tool_calls_);
  call_text_.clear();
  state_ = State::kToolCall;
  return true;
}

bool AnswerParser::AdvanceToolCall(bool final, AnswerDelta* delta) {
  size_t used = 0;
  bool broken = false;
  while (used < held_.size() && !broken && !(reader_->complete() && held_[used] == '<')) {
    call_text_ += held_[used];
    broken = !reader_->Push(held_[used++], &delta->tool_calls);
  }
  held_.erase(0, used);
  if (!broken && reader_->complete()) {
    // A closing tag that is cut off or misspelt takes nothing from a call that is whole.
    if (!final && held_.size() < kCallClose.size() && kCallClose.starts_with(held_)) return false;
    if (held_.starts_with(kCallClose)) held_.erase(0, kCallClose.size());
    ++num_tool_calls_;
    ++num_complete_;
    state_ = State::kBetween;
    return true;
  }
  if (!broken && !final) return false;
  held_ = call_text_ + held_;
  state_ = State::kNoCall;
  return true;
}

// What stands in the place of a call and is none: content, without the markup. Unless its name went out
// already; then what is known of it was said.
bool AnswerParser::AdvanceNoCall(bool final, AnswerDelta* delta) {
  const size_t close = held_.find(kCallClose);
  if (close == std::string::npos && !final) return false;
  std::string inside = held_.substr(0, close);
  held_.erase(0, close == std::string::npos ? close : close + kCallClose.size());
  state_ = reader_->announced() ? State::kBetween : State::kContent;
  if (reader_->announced()) {
    ++num_tool_calls_;
    return true;
  }
  for (size_t open = inside.find(kCallOpen); open != std::string::npos; open = inside.find(kCallOpen))
    inside.erase(open, kCallOpen.size());
  // An opening tag that the end of the answer cut off would be markup too.
  inside.erase(inside.size() - PartialTag(inside, kCallClose));
  StripSpaceLeft(&inside);
  StripNewlinesRight(&inside);
  delta->content += inside;
  return true;
}

}  // namespace millrace::server
