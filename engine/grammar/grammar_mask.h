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
#include <unordered_map>
#include <vector>

#include "engine/grammar/automaton.h"
#include "engine/grammar/matcher.h"
#include "engine/grammar/state_classes.h"
#include "engine/grammar/token_trie.h"
#include "engine/sampling/token_mask.h"

namespace millrace::engine {

// One grammar over one vocabulary. Thread-safe.
class TokenGrammar {
 public:
  // The trie outlives it.
  TokenGrammar(std::unique_ptr<const Automaton> automaton, const TokenTrie& trie)
      : automaton_(std::move(automaton)),
        trie_(trie),
        class_of_(ClassesOfStates(*automaton_, trie.depth_max())) {}

  const Automaton& automaton() const { return *automaton_; }
  const TokenTrie& trie() const { return trie_; }

  struct StateTokens {
    std::vector<uint64_t> inside;   // mask of the tokens that stay inside the rule
    std::vector<int32_t> leavings;  // trie nodes at which the rule has ended and the token may go on
  };
  // Found at the first call for a class of states (walks the trie), then kept; shared because the table may
  // be emptied when it has grown to kClassesKept.
  std::shared_ptr<const StateTokens> TokensOf(Automaton::State state);
  static constexpr size_t kClassesKept = 1024;

 private:
  const std::unique_ptr<const Automaton> automaton_;
  const TokenTrie& trie_;
  const std::vector<int32_t> class_of_;  // of each state
  std::mutex mutex_;
  std::unordered_map<int32_t, std::shared_ptr<const StateTokens>> found_;  // by class
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

// The compiled grammars of one model. Thread-safe.
class GrammarCache {
 public:
  explicit GrammarCache(const Tokenizer& tokenizer) : tokenizer_(tokenizer), trie_(tokenizer) {}

  // `constraint` is what BuildGrammar takes. The mask of a new sequence; InvalidArgument or ResourceExhausted
  // say what is wrong with the constraint.
  StatusOr<std::shared_ptr<TokenMask>> MaskFor(const std::string& constraint);
  static constexpr size_t kGrammarsKept = 64;

 private:
  const Tokenizer& tokenizer_;
  const TokenTrie trie_;
  std::mutex mutex_;
  std::vector<std::pair<std::string, std::shared_ptr<TokenGrammar>>> grammars_;  // last used last
};

}  // namespace millrace::engine
