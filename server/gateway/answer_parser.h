#pragma once
// From the text of an answer to its parts: reasoning, content and tool calls, as Ling writes them:
//
//   <think>\n...\n</think>\n\n content \n<tool_call>\n{"name": "f", "arguments": {...}}\n</tool_call>
//
// Works on a stream: what can no longer turn out to be markup goes out at once, markup never does.

#include <optional>
#include <string>
#include <vector>

namespace millrace::server {

// A piece of one tool call. The first piece of a call carries id and name, the others only arguments.
struct ToolCallDelta {
  int32_t index = 0;  // of the call within the answer
  std::string id;
  std::string name;
  std::string arguments;  // a piece of the JSON text
};

struct AnswerDelta {
  std::string reasoning;
  std::string content;
  std::vector<ToolCallDelta> tool_calls;
  bool empty() const { return reasoning.empty() && content.empty() && tool_calls.empty(); }
};

// Reads one tool call, the text between <tool_call> and </tool_call>, byte by byte. Keys come in any order.
class ToolCallReader {
 public:
  explicit ToolCallReader(int32_t index) : index_(index) {}

  // Appends to `out` what became certain. False once the text cannot be a call; then nothing was, or will be,
  // said of it unless `announced()`.
  bool Push(char byte, std::vector<ToolCallDelta>* out);
  bool announced() const { return announced_; }  // the name went out
  bool complete() const { return state_ == State::kAfter; }

 private:
  enum class State { kBefore, kKeyOrEnd, kKey, kColon, kValue, kCommaOrEnd, kAfter, kBroken };
  bool Step(char byte);
  bool BeginValue(char byte);
  bool StepValue(char byte);
  void EndValue();

  const int32_t index_;
  State state_ = State::kBefore;
  std::string key_;
  std::string value_;      // of the value being read: its JSON text
  std::string arguments_;  // certain, not said yet
  std::optional<std::string> name_;
  bool is_arguments_ = false;  // the value being read is the arguments' and goes out as it comes
  bool in_string_ = false;
  bool escaped_ = false;
  int32_t depth_ = 0;
  bool announced_ = false;
  bool arguments_seen_ = false;
};

struct AnswerParserOptions {
  bool thinking = false;          // the answer begins with reasoning even when its opener is missing
  bool split_reasoning = true;    // a <think> block at the start is reasoning
  bool tools = false;             // <tool_call> blocks are tool calls
  bool single_tool_call = false;  // the answer is over after the first
};

// One per choice; one thread at a time.
class AnswerParser {
 public:
  explicit AnswerParser(const AnswerParserOptions& options);

  AnswerDelta Push(const std::string& text);
  // The answer has ended: what was held back.
  AnswerDelta Finish();

  int32_t num_tool_calls() const { return num_tool_calls_; }
  bool reasoning() const { return state_ == State::kReasoning; }
  // With single_tool_call: a call is complete, nothing more is wanted.
  bool satisfied() const { return options_.single_tool_call && num_complete_ > 0; }

 private:
  enum class State { kStart, kReasoning, kBetween, kContent, kToolCall, kNoCall };
  // One step on held_; false when more text is needed.
  bool Advance(bool final, AnswerDelta* delta);
  bool AdvanceStart(bool final);
  bool AdvanceReasoning(bool final, AnswerDelta* delta);
  bool AdvanceContent(bool final, AnswerDelta* delta);
  bool AdvanceToolCall(bool final, AnswerDelta* delta);
  bool AdvanceNoCall(bool final, AnswerDelta* delta);

  const AnswerParserOptions options_;
  State state_;
  std::string held_;              // not parsed yet, or not certain
  bool reasoning_begun_ = false;  // some of it went out
  std::optional<ToolCallReader> reader_;
  std::string call_text_;  // of the call being read, in case it is none
  int32_t num_tool_calls_ = 0;
  int32_t num_complete_ = 0;
};

}  // namespace millrace::server
