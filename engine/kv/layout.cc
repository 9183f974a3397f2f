#include "engine/kv/layout.h"

#include "base/random.h"

namespace millrace::engine {

uint64_t KvLayout::CompatibilityHash() const {
  // The order of a piece's dimensions; a new one gets a new number.
  constexpr uint64_t kPieceOrder = 1;
  uint64_t hash = Mix64(kPieceOrder);
  for (const uint64_t field :
       {static_cast<uint64_t>(kPageTokens), static_cast<uint64_t>(num_layers),
        static_cast<uint64_t>(num_kv_heads), static_cast<uint64_t>(head_dim), static_cast<uint64_t>(dtype)}) {
    hash = Mix64(hash ^ field);
  }
  return hash;
}

}  // namespace millrace::engine
