#include "engine/kv/page_keys.h"

#include "base/digest.h"
#include "engine/kv/layout.h"

namespace millrace::engine {

uint64_t CacheRoot(const std::string& model_digest, const std::string& salt) {
  return Xxh3(AsBytes(salt), Xxh3(AsBytes(model_digest)));
}

void ExtendPageKeys(uint64_t root, std::span<const int32_t> tokens, std::vector<uint64_t>* keys) {
  constexpr size_t kTokens = kPageTokens;
  for (size_t page = keys->size(); (page + 1) * kTokens <= tokens.size(); ++page) {
    const uint64_t before = page == 0 ? root : keys->back();
    keys->push_back(Xxh3(std::as_bytes(tokens.subspan(page * kTokens, kTokens)), before));
  }
}

}  // namespace millrace::engine
