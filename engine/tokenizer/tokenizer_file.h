#pragma once
// tokenizer.json as checked plain data.

#include <string>
#include <utility>
#include <vector>

#include "base/status.h"
#include "engine/tokenizer/tokenizer.h"

namespace millrace::engine {

struct AddedToken {
  TokenId id;
  std::string content;  // not empty, valid UTF-8
  bool is_special;
  bool is_normalized;  // looked for in normalised text, after the others were cut out
};

struct TokenizerFile {
  struct Merge {
    TokenId left, right, result;
  };
  std::vector<std::pair<std::string, TokenId>>
      vocab;                  // names in the byte alphabet; ids are unique and in range
  std::vector<Merge> merges;  // lowest rank first
  std::vector<AddedToken> added_tokens;
  bool ignore_merges = false;
  bool nfc = false;
};

// Reads and checks `path`. Unimplemented or InvalidArgument names the file and the field.
StatusOr<TokenizerFile> ReadTokenizerFile(const std::string& path);

}  // namespace millrace::engine
