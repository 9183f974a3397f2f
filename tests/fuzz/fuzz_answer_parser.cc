// What a model writes: reasoning and tool calls come out the same however the text is cut, and markup never
// does.
#include <fuzzer/FuzzedDataProvider.h>

#include "base/json.h"
#include "server/gateway/answer_parser.h"

using namespace millrace;
using namespace millrace::server;

namespace {

struct Whole {
  std::string reasoning;
  std::string content;
  std::vector<std::pair<std::string, std::string>> calls;  // name, arguments
  bool operator==(const Whole&) const = default;
};

void Add(const AnswerDelta& delta, Whole* whole) {
  whole->reasoning += delta.reasoning;
  whole->content += delta.content;
  for (const ToolCallDelta& call : delta.tool_calls) {
    const auto index = static_cast<size_t>(call.index);
    if (index > whole->calls.size()) __builtin_trap();  // calls come one after the other
    if (index == whole->calls.size()) {
      if (call.id.empty() || call.name.empty()) __builtin_trap();
      whole->calls.emplace_back(call.name, "");
    }
    whole->calls[index].second += call.arguments;
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* bytes, size_t size) {
  FuzzedDataProvider data(bytes, size);
  AnswerParserOptions options;
  options.thinking = data.ConsumeBool();
  options.split_reasoning = data.ConsumeBool();
  options.tools = data.ConsumeBool();
  const std::vector<uint8_t> cuts = data.ConsumeBytes<uint8_t>(8);
  const std::string text = data.ConsumeRemainingBytesAsString();

  Whole at_once;
  AnswerParser one(options);
  Add(one.Push(text), &at_once);
  Add(one.Finish(), &at_once);

  Whole in_pieces;
  AnswerParser many(options);
  size_t at = 0;
  for (size_t i = 0; at < text.size(); ++i) {
    const size_t length = cuts.empty() ? 1 : 1 + cuts[i % cuts.size()] % 17;
    Add(many.Push(text.substr(at, length)), &in_pieces);
    at += length;
  }
  Add(many.Finish(), &in_pieces);
  if (!(at_once == in_pieces)) __builtin_trap();
  if (at_once.calls.size() != static_cast<size_t>(one.num_tool_calls())) __builtin_trap();
  return 0;
}
