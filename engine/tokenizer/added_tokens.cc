#include "engine/tokenizer/added_tokens.h"

#include "base/check.h"

namespace millrace::engine {

void AddedTokenTrie::Insert(std::string_view content, TokenId id) {
  MR_CHECK(!content.empty());
  int32_t node = 0;
  for (const char byte : content) {
    const auto [edge, is_new] = edges_.try_emplace(Edge(node, byte), num_nodes_);
    if (is_new) ++num_nodes_;
    node = edge->second;
  }
  ids_[node] = id;
}

std::optional<AddedTokenTrie::Match> AddedTokenTrie::FindNext(std::string_view text, size_t from) const {
  for (size_t begin = from; begin < text.size(); ++begin) {
    std::optional<Match> longest;
    int32_t node = 0;
    for (size_t i = begin; i < text.size(); ++i) {
      const auto edge = edges_.find(Edge(node, text[i]));
      if (edge == edges_.end()) break;
      node = edge->second;
      if (const auto id = ids_.find(node); id != ids_.end())
        longest = Match{begin, i + 1 - begin, id->second};
    }
    if (longest) return longest;
  }
  return std::nullopt;
}

}  // namespace millrace::engine
