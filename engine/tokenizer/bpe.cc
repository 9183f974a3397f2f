#include "engine/tokenizer/bpe.h"

#include <algorithm>

namespace millrace::engine {
namespace {

constexpr TokenId kMergedAway = -1;

// Heap order: the lowest rank on top, the leftmost among equals.
bool After(const Bpe::Scratch::Candidate& a, const Bpe::Scratch::Candidate& b) {
  return a.rank != b.rank ? a.rank > b.rank : a.position > b.position;
}

}  // namespace

void Bpe::Offer(int32_t position, Scratch& scratch) const {
  const auto& symbol = scratch.symbols[static_cast<size_t>(position)];
  if (symbol.next < 0) return;
  const auto found = merges_.find(Key(symbol.id, scratch.symbols[static_cast<size_t>(symbol.next)].id));
  if (found == merges_.end()) return;
  scratch.heap.push_back({found->second.rank, position, found->second.result});
  std::push_heap(scratch.heap.begin(), scratch.heap.end(), After);
}

void Bpe::Encode(std::string_view piece, Scratch& scratch, std::vector<TokenId>& out) const {
  if (!whole_pieces_.empty()) {
    if (const auto whole = whole_pieces_.find(piece); whole != whole_pieces_.end()) {
      out.push_back(whole->second);
      return;
    }
  }
  auto& symbols = scratch.symbols;
  auto& heap = scratch.heap;
  symbols.clear();
  heap.clear();
  const auto count = static_cast<int32_t>(piece.size());
  for (int32_t i = 0; i < count; ++i) {
    const auto byte = static_cast<uint8_t>(piece[static_cast<size_t>(i)]);
    symbols.push_back({byte_ids_[byte], i - 1, i + 1 < count ? i + 1 : -1});
  }
  for (int32_t i = 0; i < count; ++i) Offer(i, scratch);

  while (!heap.empty()) {
    std::pop_heap(heap.begin(), heap.end(), After);
    const Scratch::Candidate best = heap.back();
    heap.pop_back();
    auto& left = symbols[static_cast<size_t>(best.position)];
    if (left.id == kMergedAway || left.next < 0) continue;
    auto& right = symbols[static_cast<size_t>(left.next)];
    // The pair may have changed since it was offered; then its new form has a candidate of its own.
    const auto found = merges_.find(Key(left.id, right.id));
    if (found == merges_.end() || found->second.result != best.result) continue;
    left.id = best.result;
    right.id = kMergedAway;
    left.next = right.next;
    if (right.next >= 0) symbols[static_cast<size_t>(right.next)].previous = best.position;
    if (left.previous >= 0) Offer(left.previous, scratch);
    Offer(best.position, scratch);
  }
  for (int32_t i = count > 0 ? 0 : -1; i >= 0; i = symbols[static_cast<size_t>(i)].next) {
    out.push_back(symbols[static_cast<size_t>(i)].id);
  }
}

}  // namespace millrace::engine
