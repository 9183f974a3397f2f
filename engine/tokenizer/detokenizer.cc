#include "engine/tokenizer/tokenizer.h"
#include "engine/tokenizer/utf8.h"

namespace millrace::engine {

Detokenizer::Detokenizer(const Tokenizer& tokenizer, bool skip_special)
    : tokenizer_(tokenizer), skip_special_(skip_special) {}

std::string Detokenizer::Push(TokenId id) {
  // A skipped token leaves pending_ alone: the bytes around it still join, as they do in Decode.
  if (skip_special_ && tokenizer_.IsSpecial(id)) return std::string();
  pending_.append(tokenizer_.Bytes(id));
  return Drain(/*final=*/false);
}

std::string Detokenizer::Finish() { return Drain(/*final=*/true); }

std::string Detokenizer::Drain(bool final) {
  constexpr std::string_view kReplacement = "\xEF\xBF\xBD";
  std::string text;
  std::string_view rest = pending_;
  while (!rest.empty()) {
    const Utf8Step step = StepUtf8(rest);
    if (step.state == Utf8Step::State::kIncomplete && !final) break;
    text.append(step.state == Utf8Step::State::kValid ? rest.substr(0, step.bytes) : kReplacement);
    rest.remove_prefix(step.bytes);
  }
  pending_.erase(0, pending_.size() - rest.size());
  return text;
}

}  // namespace millrace::engine
