#pragma once
// Names of KV pages by content: a chain of hashes, each over one full page of tokens and all before it. The
// same on every worker and in the router. A name is a hint, never a proof: whoever uses a page compares its
// tokens.

#include <cstdint>
#include <span>
#include <string>
#include <vector>

namespace millrace::engine {

// Where a chain starts: pages are shared only within one model and one salt.
uint64_t CacheRoot(const std::string& model_digest, const std::string& salt);

// Appends the keys of the full pages of `tokens` that `keys` does not have yet. O(new tokens).
void ExtendPageKeys(uint64_t root, std::span<const int32_t> tokens, std::vector<uint64_t>* keys);

}  // namespace millrace::engine
