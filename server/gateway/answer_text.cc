#include "server/gateway/answer_text.h"

#include <algorithm>

namespace millrace::server {

AnswerText::AnswerText(const engine::Tokenizer& tokenizer, std::vector<std::string> stop, bool skip_special,
                       bool include_stop)
    : detokenizer_(tokenizer, skip_special), stop_(std::move(stop)), include_stop_(include_stop) {}

AnswerText::Delta AnswerText::Push(engine::TokenId token) { return Release(detokenizer_.Push(token), false); }

AnswerText::Delta AnswerText::Finish() { return Release(detokenizer_.Finish(), true); }

AnswerText::Delta AnswerText::Release(std::string text, bool final) {
  held_ += text;
  size_t stop_at = std::string::npos;
  size_t stop_length = 0;
  for (const std::string& stop : stop_) {
    const size_t at = held_.find(stop);
    if (at >= stop_at) continue;
    stop_at = at;
    stop_length = stop.size();
  }
  if (stop_at != std::string::npos) {
    Delta delta{held_.substr(0, stop_at + (include_stop_ ? stop_length : 0)), true};
    held_.clear();
    return delta;
  }
  // The longest tail of held_ that begins some stop string stays back.
  size_t keep = 0;
  if (!final) {
    for (const std::string& stop : stop_) {
      for (size_t length = std::min(stop.size() - 1, held_.size()); length > keep; --length) {
        if (held_.compare(held_.size() - length, length, stop, 0, length) == 0) keep = length;
      }
    }
  }
  // A stop string may begin inside a code point's bytes only if it is not UTF-8; the edge refuses those.
  Delta delta{held_.substr(0, held_.size() - keep), false};
  held_.erase(0, held_.size() - keep);
  return delta;
}

}  // namespace millrace::server
