#include "engine/grammar/state_tokens.h"

#include <utility>

namespace millrace::engine {

uint32_t StateTokensStore::NewGrammar() {
  std::lock_guard lock(mutex_);
  return grammars_++;
}

std::shared_ptr<const StateTokens> StateTokensStore::Find(uint32_t grammar, int32_t state_class) {
  std::lock_guard lock(mutex_);
  const auto found = by_key_.find(Key(grammar, state_class));
  if (found == by_key_.end()) return nullptr;
  entries_.splice(entries_.begin(), entries_, found->second);
  return found->second->tokens;
}

std::shared_ptr<const StateTokens> StateTokensStore::Keep(uint32_t grammar, int32_t state_class,
                                                          std::shared_ptr<const StateTokens> found) {
  const uint64_t key = Key(grammar, state_class);
  const size_t bytes = found->bytes();
  Entries gone;  // freed after the lock
  std::lock_guard lock(mutex_);
  const auto [at, added] = by_key_.try_emplace(key);
  if (!added) return at->second->tokens;
  entries_.push_front({key, found, bytes});
  at->second = entries_.begin();
  bytes_ += bytes;
  while (bytes_ > bytes_max_) {
    bytes_ -= entries_.back().bytes;
    by_key_.erase(entries_.back().key);
    gone.splice(gone.begin(), entries_, std::prev(entries_.end()));
  }
  return found;
}

size_t StateTokensStore::bytes() const {
  std::lock_guard lock(mutex_);
  return bytes_;
}

}  // namespace millrace::engine
