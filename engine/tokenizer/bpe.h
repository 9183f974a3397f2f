#pragma once
// Byte-pair merging of one piece.

#include <array>
#include <cstdint>
#include <string>
#include <string_view>
#include <unordered_map>
#include <utility>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "engine/tokenizer/tokenizer.h"

namespace millrace::engine {

// Immutable once filled; any thread.
class Bpe {
 public:
  // Working memory of Merge, kept between pieces by the caller.
  struct Scratch {
    struct Symbol {
      TokenId id;
      int32_t previous, next;  // indices of symbols; -1 at the ends
    };
    struct Candidate {
      int32_t rank;
      int32_t position;
      TokenId result;
    };
    std::vector<Symbol> symbols;
    std::vector<Candidate> heap;
  };

  void SetByte(uint8_t byte, TokenId id) { byte_ids_[byte] = id; }
  // A lower rank merges first. A pair that is given again takes the later rank and result.
  void SetMerge(TokenId left, TokenId right, int32_t rank, TokenId result) {
    merges_[Key(left, right)] = {rank, result};
  }
  // A piece equal to `bytes` becomes `id` without merging.
  void SetWholePiece(std::string bytes, TokenId id) { whole_pieces_[std::move(bytes)] = id; }

  // Appends the ids of `piece` to `out`. O(n log n).
  void Encode(std::string_view piece, Scratch& scratch, std::vector<TokenId>& out) const;

 private:
  struct Merge {
    int32_t rank;
    TokenId result;
  };
  struct BytesHash {
    using is_transparent = void;
    size_t operator()(std::string_view bytes) const { return std::hash<std::string_view>()(bytes); }
  };

  static uint64_t Key(TokenId left, TokenId right) {
    return (static_cast<uint64_t>(static_cast<uint32_t>(left)) << 32) | static_cast<uint32_t>(right);
  }
  // Offers symbols[position] and its successor as a candidate, if they can merge.
  void Offer(int32_t position, Scratch& scratch) const;

  std::array<TokenId, 256> byte_ids_{};
  absl::flat_hash_map<uint64_t, Merge> merges_;
  std::unordered_map<std::string, TokenId, BytesHash, std::equal_to<>> whole_pieces_;
};

}  // namespace millrace::engine
