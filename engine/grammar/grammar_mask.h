#pragma once
// Grammars over a token vocabulary: which tokens keep an answer inside a grammar.
//
// For each state of the automaton, the tokens that stay inside the state's own rule (and those that it calls)
// are found once, by walking the vocabulary's trie, and kept for all sequences. Only tokens that run beyond
// the end of the rule depend on the stack; where they leave is kept too, and they are walked on when the
// stack is known. (The same split as "context-independent tokens" in XGrammar, Dong et al. 2024.) States that
// no token can tell apart share what was found (state_classes.h).

#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "engine/grammar/automaton.h"
#include "engine/grammar/matcher.h"
#include "engine/grammar/state_classes.h"
#include "engine/grammar/state_tokens.h"
#include "engine/grammar/token_trie.h"
#include "engine/sampling/token_mask.h"

namespace millrace::engine {

// One grammar over one vocabulary. Thread-safe.
class TokenGrammar {
 public:
  // Trie and store outlive it.
  TokenGrammar(std::unique_ptr<const Automaton> automaton, const TokenTrie& trie, StateTokensStore* store)
      : automaton_(std::move(automaton)),
        trie_(trie),
        class_of_(ClassesOfStates(*automaton_, trie.depth_max())),
        store_(store),
        number_(store->NewGrammar()) {}

  const Automaton& automaton() const { return *automaton_; }
  const TokenTrie& trie() const { return trie_; }
  size_t bytes() const { return automaton_->bytes() + class_of_.capacity() * sizeof(int32_t); }

  // Found by walking the trie unless the store has it.
  std::shared_ptr<const StateTokens> TokensOf(Automaton::State state);

 private:
  const std::unique_ptr<const Automaton> automaton_;
  const TokenTrie& trie_;
  const std::vector<int32_t> class_of_;  // of each state
  StateTokensStore* const store_;
  const uint32_t number_;
};

// Of one sequence.
class GrammarMask : public TokenMask {
 public:
  // `grammar` is shared by the sequences that use it; `tokenizer` outlives this.
  GrammarMask(std::shared_ptr<TokenGrammar> grammar, const Tokenizer& tokenizer);
  Allowed After(std::span<const int32_t> output) override;

 private:
  struct Known {
    Configs configs;
    std::vector<uint64_t> tokens;
  };
  void Follow(std::span<const int32_t> output);
  void Fill(const Configs& configs, std::vector<uint64_t>* tokens);

  const std::shared_ptr<TokenGrammar> grammar_;
  const Tokenizer& tokenizer_;
  Matcher matcher_;
  std::vector<int32_t> output_;   // that was followed
  std::vector<Configs> history_;  // before token i; history_.size() == output_.size() + 1
  std::vector<Known> known_;      // the last masks; a string's tokens mostly ask for the same one
  size_t next_known_ = 0;
};

struct GrammarCacheOptions {
  size_t grammars_bytes_max = size_t{128} << 20;
  size_t grammars_max = 256;  // that are looked through for each new sequence
  size_t tokens_bytes_max = size_t{256} << 20;
};

// The compiled grammars of one model, those last used within both bounds, and what was found of their
// states within tokens_bytes_max. Grammars that sequences hold live on when they go from here. Outlives the
// masks. Thread-safe.
class GrammarCache {
 public:
  explicit GrammarCache(const Tokenizer& tokenizer, const GrammarCacheOptions& options = {})
      : options_(options), tokenizer_(tokenizer), trie_(tokenizer), store_(options.tokens_bytes_max) {}

  // `constraint` is what BuildGrammar takes. The mask of a new sequence; InvalidArgument or ResourceExhausted
  // say what is wrong with the constraint.
  StatusOr<std::shared_ptr<TokenMask>> MaskFor(const std::string& constraint);
  size_t grammars_bytes() const;
  size_t tokens_bytes() const { return store_.bytes(); }

 private:
  struct Entry {
    std::string constraint;
    std::shared_ptr<TokenGrammar> grammar;
    size_t bytes;
  };

  const GrammarCacheOptions options_;
  const Tokenizer& tokenizer_;
  const TokenTrie trie_;
  StateTokensStore store_;
  mutable std::mutex mutex_;     // guards what follows
  std::vector<Entry> grammars_;  // last used last
  size_t grammars_bytes_ = 0;
};

}  // namespace millrace::engine
