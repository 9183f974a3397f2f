#include "server/gateway/choice.h"

#include <utility>

namespace millrace::server {

Choice::Choice(const ApiRequest& request, const engine::Tokenizer& tokenizer, int32_t index)
    : request_(request),
      tokenizer_(tokenizer),
      text_(tokenizer, request.stop, request.skip_special_tokens, request.include_stop),
      parser_(request.parser),
      index_(index) {}

void Choice::Append(const AnswerDelta& parts) {
  AnswerDelta& all = pending_.parts;
  all.content += parts.content;
  if (request_.include_reasoning) all.reasoning += parts.reasoning;
  all.tool_calls.insert(all.tool_calls.end(), parts.tool_calls.begin(), parts.tool_calls.end());
}

ChoiceDelta Choice::Push(const engine::TokenEvent& token) {
  if (num_tokens_++ == 0 && request_.echo)
    pending_.parts.content = tokenizer_.Decode(request_.PromptOf(index_), request_.skip_special_tokens);
  if (!token.prompt.empty()) pending_.prompt = token.prompt;
  pending_.tokens.push_back(token.token);
  AnswerText::Delta text = text_.Push(token.token.token);
  Append(parser_.Push(text.text));
  if (parser_.reasoning()) ++num_reasoning_tokens_;
  bool stopped = text.stopped || parser_.satisfied();
  const bool ended = token.finish != engine::FinishReason::kNone;
  if (ended && !stopped) {
    text = text_.Finish();
    stopped = text.stopped;
    Append(parser_.Push(text.text));
  }
  if (ended || stopped) {
    Append(parser_.Finish());
    pending_.finish = !stopped && token.finish == engine::FinishReason::kLength ? "length"
                      : parser_.num_tool_calls() > 0                            ? "tool_calls"
                                                                                : "stop";
  }
  if (pending_.empty()) return ChoiceDelta{index_, {}, {}, {}, {}};
  ChoiceDelta delta = std::exchange(pending_, {});
  delta.choice = index_;
  return delta;
}

}  // namespace millrace::server
