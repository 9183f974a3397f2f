#include "engine/grammar/token_trie.h"

#include <algorithm>
#include <string_view>

namespace millrace::engine {

TokenTrie::TokenTrie(const Tokenizer& tokenizer) {
  std::vector<std::pair<std::string_view, TokenId>> sorted;
  for (TokenId id = 0; id < tokenizer.size(); ++id) {
    if (!tokenizer.HasToken(id) || tokenizer.IsSpecial(id) || tokenizer.Bytes(id).empty()) continue;
    sorted.emplace_back(tokenizer.Bytes(id), id);
  }
  std::sort(sorted.begin(), sorted.end());
  num_words_ = (static_cast<size_t>(tokenizer.size()) + 63) / 64;
  std::vector<int32_t> path;  // nodes from the root to the last token
  std::string_view last;
  for (const auto& [bytes, id] : sorted) {
    size_t shared = 0;
    while (shared < std::min(last.size(), bytes.size()) && last[shared] == bytes[shared]) ++shared;
    for (; path.size() > shared; path.pop_back())
      nodes_[static_cast<size_t>(path.back())].end = static_cast<int32_t>(nodes_.size());
    for (size_t i = shared; i < bytes.size(); ++i) {
      path.push_back(static_cast<int32_t>(nodes_.size()));
      nodes_.push_back({static_cast<uint8_t>(bytes[i]), static_cast<int32_t>(i) + 1, 0,
                        static_cast<int32_t>(tokens_.size())});
    }
    tokens_.push_back(id);
    depth_max_ = std::max(depth_max_, static_cast<int32_t>(bytes.size()));
    last = bytes;
  }
  for (; !path.empty(); path.pop_back())
    nodes_[static_cast<size_t>(path.back())].end = static_cast<int32_t>(nodes_.size());
  nodes_.push_back({0, 0, static_cast<int32_t>(nodes_.size()) + 1, static_cast<int32_t>(tokens_.size())});
}

}  // namespace millrace::engine
