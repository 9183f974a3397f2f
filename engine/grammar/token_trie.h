#pragma once
// The vocabulary as a trie of bytes, laid out in the order of a walk.

#include <cstdint>
#include <vector>

#include "engine/tokenizer/tokenizer.h"

namespace millrace::engine {

// Immutable; any thread. Special tokens and ids without a token are left out: no grammar speaks of them.
class TokenTrie {
 public:
  explicit TokenTrie(const Tokenizer& tokenizer);

  struct Node {
    uint8_t byte = 0;
    int32_t depth = 0;        // bytes from the root to here, at least 1
    int32_t end = 0;          // index behind this node's subtree
    int32_t first_token = 0;  // tokens()[first_token] and on, up to the next node's, end at this node
  };
  // In preorder; a last one stands behind them all.
  const std::vector<Node>& nodes() const { return nodes_; }
  int32_t num_nodes() const { return static_cast<int32_t>(nodes_.size()) - 1; }
  const std::vector<TokenId>& tokens() const { return tokens_; }
  int32_t depth_max() const { return depth_max_; }
  size_t num_words() const { return num_words_; }  // of a mask over all ids

 private:
  std::vector<Node> nodes_;
  std::vector<TokenId> tokens_;
  int32_t depth_max_ = 0;
  size_t num_words_ = 0;
};

}  // namespace millrace::engine
