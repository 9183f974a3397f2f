#pragma once
// Byte-level BPE as tokenizer.json describes it, with the Ling pre-tokenizer split done by a hand-written
// scanner.

#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "base/status.h"

namespace millrace::engine {

using TokenId = int32_t;

// Immutable after Load; any thread.
class Tokenizer {
 public:
  // Reads <directory>/tokenizer.json. Refuses, by name, whatever part of the file it does not implement
  // (another model type, normaliser, pre-tokenizer, decoder). Errors name the file and the field.
  static StatusOr<std::unique_ptr<Tokenizer>> Load(const std::string& directory);
  ~Tokenizer();

  // Ids of `text`, which must be UTF-8 (else InvalidArgument with the byte offset). Added tokens inside the
  // text are recognised when `parse_special` is true; otherwise their characters are encoded as ordinary
  // text. Adds nothing.
  StatusOr<std::vector<TokenId>> Encode(std::string_view text, bool parse_special = true) const;

  // The bytes of one token: raw bytes for ordinary tokens (may be part of a code point), the text of an added
  // token. Empty for an id that has no token.
  std::string_view Bytes(TokenId id) const;
  // Concatenated bytes; special tokens are left out when `skip_special`.
  std::string Decode(std::span<const TokenId> ids, bool skip_special) const;

  bool IsSpecial(TokenId id) const;  // an added token marked special
  bool HasToken(TokenId id) const;   // false for padding ids of the vocabulary and out of range
  std::optional<TokenId> Find(std::string_view token_text) const;  // an added token by its text
  int32_t size() const;                                            // largest id + 1

 private:
  struct Data;
  explicit Tokenizer(std::unique_ptr<Data> data);
  std::unique_ptr<Data> data_;
};

// Turns a stream of tokens into a stream of text that never splits a code point: incomplete UTF-8 is held
// back until it is complete or Finish. Bytes that can never become UTF-8 come out as U+FFFD, one per maximal
// bad prefix, as Unicode recommends. One per choice; one thread at a time.
class Detokenizer {
 public:
  explicit Detokenizer(const Tokenizer& tokenizer, bool skip_special = true);
  // The text that `id` completes; may be empty.
  std::string Push(TokenId id);
  // What is still held back, as U+FFFD where incomplete.
  std::string Finish();

 private:
  std::string Drain(bool final);
  const Tokenizer& tokenizer_;
  const bool skip_special_;
  std::string pending_;  // at most 3 bytes between calls
};

}  // namespace millrace::engine
