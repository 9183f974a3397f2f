#include "engine/grammar/grammar_mask.h"

#include <algorithm>

#include "engine/grammar/constraint.h"

namespace millrace::engine {
namespace {

constexpr size_t kMasksKept = 8;

void Set(std::vector<uint64_t>* mask, TokenId token) {
  (*mask)[static_cast<size_t>(token) / 64] |= uint64_t{1} << (static_cast<size_t>(token) % 64);
}

// Walks the nodes [begin, end) of the trie, a forest below nodes of one depth, from `start`. For each node
// that can be reached: visit(node, configs after it).
template <typename Visit>
void Walk(Matcher& matcher, const TokenTrie& trie, int32_t begin, int32_t end, const Configs& start,
          const Visit& visit) {
  if (begin >= end) return;
  const auto& nodes = trie.nodes();
  const int32_t top = nodes[static_cast<size_t>(begin)].depth;
  thread_local std::vector<Configs> levels;  // reused: a walk allocates little
  levels.resize(std::max(levels.size(), static_cast<size_t>(trie.depth_max()) + 1));
  levels[0] = start;
  for (int32_t i = begin; i < end;) {
    const TokenTrie::Node& node = nodes[static_cast<size_t>(i)];
    const auto level = static_cast<size_t>(node.depth - top);
    matcher.Step(levels[level], node.byte, &levels[level + 1]);
    const Configs& configs = levels[level + 1];
    if (!configs.list.empty()) visit(i, configs);
    i = configs.list.empty() ? node.end : i + 1;
  }
}

}  // namespace

std::shared_ptr<const StateTokens> TokenGrammar::TokensOf(Automaton::State state) {
  const int32_t of = class_of_[static_cast<size_t>(state)];
  if (auto kept = store_->Find(number_, of); kept != nullptr) return kept;
  auto tokens = std::make_shared<StateTokens>();
  tokens->inside.resize(trie_.num_words());
  Matcher matcher(*automaton_);  // its empty stack stands for whatever is below
  Configs start;
  start.list = {{state, 0}};
  const auto& nodes = trie_.nodes();
  Walk(matcher, trie_, 0, trie_.num_nodes(), start, [&](int32_t i, const Configs& configs) {
    const TokenTrie::Node& node = nodes[static_cast<size_t>(i)];
    const int32_t last_token = nodes[static_cast<size_t>(i) + 1].first_token;
    for (int32_t t = node.first_token; t < last_token; ++t)
      Set(&tokens->inside, trie_.tokens()[static_cast<size_t>(t)]);
    if (configs.ends && node.end > i + 1) tokens->leavings.push_back(i);
  });
  tokens->leavings.shrink_to_fit();
  return store_->Keep(number_, of, std::move(tokens));
}

GrammarMask::GrammarMask(std::shared_ptr<TokenGrammar> grammar, const Tokenizer& tokenizer)
    : grammar_(std::move(grammar)), tokenizer_(tokenizer), matcher_(grammar_->automaton()) {
  history_.push_back(matcher_.Start());
}

// Goes back to what both have in common, then on.
void GrammarMask::Follow(std::span<const int32_t> output) {
  const auto [mine, theirs] = std::mismatch(output_.begin(), output_.end(), output.begin(), output.end());
  const auto common = static_cast<size_t>(mine - output_.begin());
  output_.resize(common);
  history_.resize(common + 1);
  Configs next;
  for (const int32_t token : output.subspan(common)) {
    Configs now = history_.back();
    for (const char byte : tokenizer_.Bytes(token)) {
      matcher_.Step(now, static_cast<uint8_t>(byte), &next);
      std::swap(now, next);
    }
    // A special token is none of the grammar's: nothing may follow it but the end.
    if (tokenizer_.IsSpecial(token)) now = {};
    output_.push_back(token);
    history_.push_back(std::move(now));
  }
}

void GrammarMask::Fill(const Configs& configs, std::vector<uint64_t>* tokens) {
  const TokenTrie& trie = grammar_->trie();
  const auto& nodes = trie.nodes();
  tokens->assign(trie.num_words(), 0);
  for (const Config& config : configs.list) {
    const auto of_state = grammar_->TokensOf(config.state);
    for (size_t word = 0; word < tokens->size(); ++word) (*tokens)[word] |= of_state->inside[word];
    if (config.stack == 0 || of_state->leavings.empty()) continue;
    const Configs after = matcher_.Return(config.stack);
    for (const int32_t leaving : of_state->leavings) {
      Walk(matcher_, trie, leaving + 1, nodes[static_cast<size_t>(leaving)].end, after,
           [&](int32_t i, const Configs&) {
             const int32_t last_token = nodes[static_cast<size_t>(i) + 1].first_token;
             for (int32_t t = nodes[static_cast<size_t>(i)].first_token; t < last_token; ++t)
               Set(tokens, trie.tokens()[static_cast<size_t>(t)]);
           });
    }
  }
}

TokenMask::Allowed GrammarMask::After(std::span<const int32_t> output) {
  Follow(output);
  const Configs& configs = history_.back();
  // A history that does not fit, which only a foreign output can have, may only end.
  const bool may_end = configs.ends || configs.list.empty();
  for (const Known& known : known_) {
    if (known.configs == configs) return {known.tokens, may_end};
  }
  if (known_.size() < kMasksKept) known_.emplace_back();
  Known& known = known_[next_known_++ % kMasksKept];
  known.configs = configs;
  Fill(configs, &known.tokens);
  return {known.tokens, may_end};
}

StatusOr<std::shared_ptr<TokenMask>> GrammarCache::MaskFor(const std::string& constraint) {
  std::shared_ptr<TokenGrammar> grammar;
  {
    std::lock_guard lock(mutex_);
    const auto found = std::find_if(grammars_.begin(), grammars_.end(),
                                    [&](const Entry& entry) { return entry.constraint == constraint; });
    if (found != grammars_.end()) {
      grammar = found->grammar;
      std::rotate(found, found + 1, grammars_.end());
    }
  }
  if (grammar == nullptr) {
    MR_ASSIGN_OR_RETURN(const Grammar built, BuildGrammar(constraint));
    MR_ASSIGN_OR_RETURN(auto automaton, Automaton::Build(built));
    grammar = std::make_shared<TokenGrammar>(std::move(automaton), trie_, &store_);
    const size_t bytes = grammar->bytes() + constraint.capacity();
    std::lock_guard lock(mutex_);
    grammars_.push_back({constraint, grammar, bytes});
    grammars_bytes_ += bytes;
    while (grammars_bytes_ > options_.grammars_bytes_max || grammars_.size() > options_.grammars_max) {
      grammars_bytes_ -= grammars_.front().bytes;
      grammars_.erase(grammars_.begin());
    }
  }
  return std::shared_ptr<TokenMask>(std::make_shared<GrammarMask>(std::move(grammar), tokenizer_));
}

size_t GrammarCache::grammars_bytes() const {
  std::lock_guard lock(mutex_);
  return grammars_bytes_;
}

}  // namespace millrace::engine
