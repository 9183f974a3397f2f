#pragma once
// From tokens to the text that a client may see: whole code points, and nothing that could still turn out to
// be part of a stop string.

#include <string>
#include <vector>

#include "engine/tokenizer/tokenizer.h"

namespace millrace::server {

// One per answer; one thread at a time.
class AnswerText {
 public:
  // With `include_stop` the stop string that was met stays in the text.
  AnswerText(const engine::Tokenizer& tokenizer, std::vector<std::string> stop, bool skip_special,
             bool include_stop = false);

  struct Delta {
    std::string text;      // may go to the client now
    bool stopped = false;  // a stop string was met: `text` ends there and the answer is over
  };
  Delta Push(engine::TokenId token);
  // The answer ended by itself: what was held back.
  Delta Finish();

 private:
  Delta Release(std::string text, bool final);

  engine::Detokenizer detokenizer_;
  const std::vector<std::string> stop_;
  const bool include_stop_;
  std::string held_;  // text that is a proper prefix of some stop string, from some point on
};

}  // namespace millrace::server
