#pragma once
// Where a token's keys and values lie. [layer][page][k|v][kv head][token][head dim]: the bytes of one (layer,
// page) are contiguous and are the natural unit of transfer (128 KiB for Ling-mini-2.0 in bf16).

#include <cstddef>
#include <cstdint>
#include <string>

namespace millrace::engine {

using PageId = int32_t;
inline constexpr int32_t kPageTokens = 64;

enum class KvDType { kBf16, kF32 };

struct KvLayout {
  int32_t num_layers = 0;  // main layers, then the MTP layer if any
  int32_t num_pages = 0;
  int32_t num_kv_heads = 0;
  int32_t head_dim = 0;
  KvDType dtype = KvDType::kBf16;

  size_t element_bytes() const { return dtype == KvDType::kBf16 ? 2 : 4; }
  // Bytes of K (or V) of one kv head in one page.
  size_t head_bytes() const { return static_cast<size_t>(kPageTokens) * head_dim * element_bytes(); }
  size_t piece_bytes() const {
    return 2 * static_cast<size_t>(num_kv_heads) * head_bytes();
  }                                                                 // one (layer, page)
  size_t page_bytes() const { return piece_bytes() * num_layers; }  // one page over all layers
  size_t total_bytes() const { return page_bytes() * num_pages; }
  size_t piece_offset(int32_t layer, PageId page) const {
    return (static_cast<size_t>(layer) * num_pages + page) * piece_bytes();
  }
  // Offset inside a piece of the row of `token` (0..63) in head `head`; `v` 0 for K, 1 for V.
  size_t row_offset(int v, int32_t head, int32_t token) const {
    return (static_cast<size_t>(v) * num_kv_heads + head) * head_bytes() +
           static_cast<size_t>(token) * head_dim * element_bytes();
  }
  // Equal on two workers exactly if the pieces of one can be used by the other (page counts may differ).
  uint64_t CompatibilityHash() const;
};

// Pages that hold `tokens` tokens.
constexpr int32_t PagesFor(int64_t tokens) {
  return static_cast<int32_t>((tokens + kPageTokens - 1) / kPageTokens);
}

}  // namespace millrace::engine
