#pragma once
// Finds added tokens (<role>, <|role_end|>, ...) inside a text.

#include <cstddef>
#include <cstdint>
#include <optional>
#include <string_view>

#include "absl/container/flat_hash_map.h"
#include "engine/tokenizer/tokenizer.h"

namespace millrace::engine {

// A trie over bytes. Immutable once filled; any thread.
class AddedTokenTrie {
 public:
  struct Match {
    size_t begin, bytes;
    TokenId id;
  };

  // `content` is not empty. The same content again takes the later id.
  void Insert(std::string_view content, TokenId id);
  bool empty() const { return ids_.empty(); }
  // The leftmost match at or after `from`, the longest of those that begin there.
  std::optional<Match> FindNext(std::string_view text, size_t from) const;

 private:
  static uint64_t Edge(int32_t node, char byte) {
    return (static_cast<uint64_t>(static_cast<uint32_t>(node)) << 8) | static_cast<uint8_t>(byte);
  }
  absl::flat_hash_map<uint64_t, int32_t> edges_;  // (node, byte) -> node; the root is 0
  absl::flat_hash_map<int32_t, TokenId> ids_;     // node -> the token that ends there
  int32_t num_nodes_ = 1;
};

}  // namespace millrace::engine
