#pragma once
// What was found by walking the vocabulary from a state of a grammar: one store for all grammars of a model,
// bounded by bytes whatever they ask for.

#include <cstddef>
#include <cstdint>
#include <list>
#include <memory>
#include <mutex>
#include <unordered_map>
#include <vector>

namespace millrace::engine {

struct StateTokens {
  std::vector<uint64_t> inside;   // mask of the tokens that stay inside the state's rule
  std::vector<int32_t> leavings;  // trie nodes at which the rule has ended and the token may go on

  size_t bytes() const {
    return sizeof(*this) + inside.capacity() * sizeof(uint64_t) + leavings.capacity() * sizeof(int32_t);
  }
};

// Keeps the most recently used within bytes_max. What goes from here lives on with whoever holds it.
// Thread-safe.
class StateTokensStore {
 public:
  explicit StateTokensStore(size_t bytes_max) : bytes_max_(bytes_max) {}

  // A number that no other grammar of this store has or has had.
  uint32_t NewGrammar();
  // Null if it is not kept.
  std::shared_ptr<const StateTokens> Find(uint32_t grammar, int32_t state_class);
  // What is kept from now on: another thread may have been faster with the same.
  std::shared_ptr<const StateTokens> Keep(uint32_t grammar, int32_t state_class,
                                          std::shared_ptr<const StateTokens> found);
  size_t bytes() const;

 private:
  struct Entry {
    uint64_t key;
    std::shared_ptr<const StateTokens> tokens;
    size_t bytes;
  };
  using Entries = std::list<Entry>;
  static uint64_t Key(uint32_t grammar, int32_t state_class) {
    return uint64_t{grammar} << 32 | static_cast<uint32_t>(state_class);
  }

  const size_t bytes_max_;
  mutable std::mutex mutex_;  // guards what follows
  uint32_t grammars_ = 0;
  size_t bytes_ = 0;
  Entries entries_;  // last used first
  std::unordered_map<uint64_t, Entries::iterator> by_key_;
};

}  // namespace millrace::engine
