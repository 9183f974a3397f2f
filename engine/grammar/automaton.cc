#include "engine/grammar/automaton.h"

#include <algorithm>
#include <map>
#include <set>

namespace millrace::engine {
namespace {

constexpr size_t kNfaStatesMax = 400'000;

struct NfaState {
  std::vector<std::pair<std::pair<uint8_t, uint8_t>, int32_t>> bytes;
  std::vector<int32_t> empty;
  std::vector<std::pair<int32_t, int32_t>> calls;  // rule, target
};

void MarkBorders(const Expression& expression, std::array<bool, 257>* borders,
                 std::set<const Expression*>* seen) {
  if (!seen->insert(&expression).second) return;
  for (const auto& [first, last] : expression.ranges) {
    (*borders)[first] = true;
    (*borders)[last + 1U] = true;
  }
  for (const ExpressionPtr& part : expression.parts) MarkBorders(*part, borders, seen);
}

}  // namespace

// Builds rule after rule; the states of a rule follow each other, its start first.
class Automaton::Builder {
 public:
  Builder(const Grammar& grammar, Automaton* out) : grammar_(grammar), out_(*out) {}

  Status Build() {
    MakeClasses();
    std::vector<State> starts;
    std::vector<std::vector<std::pair<int32_t, State>>> calls;  // per state: rule, back
    for (size_t rule = 0; rule < grammar_.rules.size(); ++rule) {
      starts.push_back(static_cast<State>(out_.states_.size()));
      MR_RETURN_IF_ERROR(BuildRule(static_cast<int32_t>(rule), &calls));
    }
    for (size_t state = 0; state < calls.size(); ++state) {
      for (const auto& [rule, back] : calls[state])
        out_.states_[state].calls.push_back({starts[static_cast<size_t>(rule)], back, false});
    }
    return OkStatus();
  }

 private:
  void MakeClasses() {
    std::array<bool, 257> borders{};
    std::set<const Expression*> seen;
    for (const Rule& rule : grammar_.rules) MarkBorders(*rule.body, &borders, &seen);
    uint8_t next = 0;
    for (size_t byte = 0; byte < 256; ++byte) {
      if (byte > 0 && borders[byte]) ++next;
      out_.class_of_[byte] = next;
    }
    out_.num_classes_ = size_t{next} + 1;
  }

  // Appends the fragment of `expression` between `from` and the state that it returns.
  StatusOr<int32_t> Add(const Expression& expression, int32_t from) {
    using Kind = Expression::Kind;
    switch (expression.kind) {
      case Kind::kBytes: {
        MR_ASSIGN_OR_RETURN(const int32_t to, NewState());
        for (const auto& range : expression.ranges)
          nfa_[static_cast<size_t>(from)].bytes.emplace_back(range, to);
        return to;
      }
      case Kind::kSequence:
        for (const ExpressionPtr& part : expression.parts) {
          MR_ASSIGN_OR_RETURN(from, Add(*part, from));
        }
        return from;
      case Kind::kChoice: {
        MR_ASSIGN_OR_RETURN(const int32_t to, NewState());
        for (const ExpressionPtr& part : expression.parts) {
          MR_ASSIGN_OR_RETURN(const int32_t begin, NewState());
          nfa_[static_cast<size_t>(from)].empty.push_back(begin);
          MR_ASSIGN_OR_RETURN(const int32_t end, Add(*part, begin));
          nfa_[static_cast<size_t>(end)].empty.push_back(to);
        }
        return to;
      }
      case Kind::kRepeat:
        return AddRepeat(expression, from);
      case Kind::kRule: {
        MR_ASSIGN_OR_RETURN(const int32_t to, NewState());
        nfa_[static_cast<size_t>(from)].calls.emplace_back(expression.rule, to);
        return to;
      }
    }
    return Internal("an expression of no kind");
  }

  StatusOr<int32_t> AddRepeat(const Expression& expression, int32_t from) {
    const Expression& part = *expression.parts[0];
    for (int32_t i = 0; i < expression.min; ++i) {
      MR_ASSIGN_OR_RETURN(from, Add(part, from));
    }
    MR_ASSIGN_OR_RETURN(const int32_t to, NewState());
    if (expression.max < 0) {
      MR_ASSIGN_OR_RETURN(const int32_t loop, NewState());
      nfa_[static_cast<size_t>(from)].empty.push_back(loop);
      MR_ASSIGN_OR_RETURN(const int32_t end, Add(part, loop));
      nfa_[static_cast<size_t>(end)].empty.push_back(loop);
      nfa_[static_cast<size_t>(loop)].empty.push_back(to);
      return to;
    }
    for (int32_t i = expression.min; i < expression.max; ++i) {
      nfa_[static_cast<size_t>(from)].empty.push_back(to);
      MR_ASSIGN_OR_RETURN(from, Add(part, from));
    }
    nfa_[static_cast<size_t>(from)].empty.push_back(to);
    return to;
  }

  StatusOr<int32_t> NewState() {
    if (nfa_.size() >= kNfaStatesMax) return TooLarge();
    nfa_.emplace_back();
    return static_cast<int32_t>(nfa_.size()) - 1;
  }

  static Status TooLarge() {
    return ResourceExhausted("it is too large: its automaton has more than {} states", kStatesMax);
  }

  using Subset = std::vector<int32_t>;

  // What is reached from `states` without a letter, sorted; of that only what can take a letter or is the
  // end: the others would make subsets differ that go on alike, as after each of the ways to write a
  // character.
  Subset Close(const Subset& states) {
    Subset all;
    ++round_;
    marks_.resize(nfa_.size());
    const auto add = [&](int32_t state) {
      uint32_t& mark = marks_[static_cast<size_t>(state)];
      if (mark != round_) all.push_back(state);
      mark = round_;
    };
    for (const int32_t state : states) add(state);
    for (size_t i = 0; i < all.size(); ++i) {
      for (const int32_t next : nfa_[static_cast<size_t>(all[i])].empty) add(next);
    }
    std::erase_if(all, [&](int32_t state) {
      const NfaState& info = nfa_[static_cast<size_t>(state)];
      return info.bytes.empty() && info.calls.empty() && state != end_;
    });
    std::sort(all.begin(), all.end());
    return all;
  }

  Status BuildRule(int32_t rule, std::vector<std::vector<std::pair<int32_t, State>>>* calls) {
    nfa_.clear();
    MR_ASSIGN_OR_RETURN(const int32_t begin, NewState());
    MR_ASSIGN_OR_RETURN(end_, Add(*grammar_.rules[static_cast<size_t>(rule)].body, begin));
    std::map<Subset, State> known;
    std::vector<Subset> subsets;
    const auto base = static_cast<State>(out_.states_.size());
    const auto intern = [&](Subset subset) {
      const auto [found, added] =
          known.try_emplace(std::move(subset), base + static_cast<State>(subsets.size()));
      if (added) subsets.push_back(found->first);
      return found->second;
    };
    intern(Close({begin}));
    for (size_t i = 0; i < subsets.size(); ++i) {
      if (out_.states_.size() >= kStatesMax) return TooLarge();
      const Subset subset = subsets[i];
      StateInfo& info = out_.states_.emplace_back();
      info.rule = rule;
      info.ends = std::binary_search(subset.begin(), subset.end(), end_);
      std::vector<std::pair<std::pair<uint8_t, uint8_t>, int32_t>> edges;  // classes first to last, target
      std::map<int32_t, Subset> called;
      for (const int32_t state : subset) {
        const NfaState& from = nfa_[static_cast<size_t>(state)];
        for (const auto& [range, to] : from.bytes)
          edges.push_back({{out_.class_of_[range.first], out_.class_of_[range.second]}, to});
        for (const auto& [callee, to] : from.calls) called[callee].push_back(to);
      }
      Subset target, before;
      for (size_t c = 0; c < out_.num_classes_; ++c) {
        target.clear();
        for (const auto& [classes, to] : edges) {
          if (classes.first <= c && c <= classes.second) target.push_back(to);
        }
        // Neighbours mostly go the same way.
        const bool same = c > 0 && target == before;
        out_.next_.push_back(same ? out_.next_.back() : target.empty() ? kDead : intern(Close(target)));
        before.swap(target);
      }
      auto& state_calls = calls->emplace_back();
      for (const auto& [callee, back] : called) state_calls.emplace_back(callee, intern(Close(back)));
    }
    return OkStatus();
  }

  const Grammar& grammar_;
  Automaton& out_;
  std::vector<NfaState> nfa_;    // of the current rule
  int32_t end_ = 0;              // of the current rule
  std::vector<uint32_t> marks_;  // per NFA state: the last Close that met it
  uint32_t round_ = 0;
};

StatusOr<std::unique_ptr<const Automaton>> Automaton::Build(const Grammar& grammar) {
  std::unique_ptr<Automaton> automaton(new Automaton());
  MR_RETURN_IF_ERROR(Builder(grammar, automaton.get()).Build());
  MR_RETURN_IF_ERROR(automaton->Prune(grammar));
  MR_RETURN_IF_ERROR(automaton->RefuseLeftRecursion(grammar));
  return std::unique_ptr<const Automaton>(std::move(automaton));
}

std::vector<uint8_t> Automaton::Letters() const {
  std::vector<uint8_t> letters;
  for (size_t byte = 0; byte < 256; ++byte) {
    if (byte == 0 || class_of_[byte] != class_of_[byte - 1]) letters.push_back(static_cast<uint8_t>(byte));
  }
  return letters;
}

size_t Automaton::bytes() const {
  size_t bytes = sizeof(*this) + next_.capacity() * sizeof(State) + states_.capacity() * sizeof(StateInfo);
  for (const StateInfo& state : states_) bytes += state.calls.capacity() * sizeof(Call);
  return bytes;
}

bool Automaton::HasByteEdge(State state) const {
  const auto row = next_.begin() + static_cast<ptrdiff_t>(static_cast<size_t>(state) * num_classes_);
  return std::any_of(row, row + static_cast<ptrdiff_t>(num_classes_), [](State to) { return to != kDead; });
}

// Cuts what can never reach the end of its rule.
Status Automaton::Prune(const Grammar& grammar) {
  std::vector<bool> live(states_.size());
  const auto is_live = [&](State state) { return live[static_cast<size_t>(state)]; };
  for (bool changed = true; changed;) {
    changed = false;
    // Backwards, because a state's successors mostly come later: few rounds.
    for (size_t state = states_.size(); state-- > 0;) {
      if (live[state]) continue;
      const StateInfo& info = states_[state];
      bool found = info.ends || std::any_of(info.calls.begin(), info.calls.end(), [&](const Call& call) {
                     return is_live(call.start) && is_live(call.back);
                   });
      for (size_t c = 0; c < num_classes_ && !found; ++c) {
        const State to = next_[state * num_classes_ + c];
        found = to != kDead && is_live(to);
      }
      live[state] = found;
      changed = changed || found;
    }
  }
  if (!live[0]) return InvalidArgument("nothing matches: '{}' can never end", grammar.rules[0].name);
  for (State& to : next_) {
    if (to != kDead && !is_live(to)) to = kDead;
  }
  for (StateInfo& info : states_) {
    std::erase_if(info.calls, [&](const Call& call) { return !is_live(call.start) || !is_live(call.back); });
  }
  for (StateInfo& info : states_) {
    for (Call& call : info.calls)
      call.tail = ends(call.back) && CallsOf(call.back).empty() && !HasByteEdge(call.back);
  }
  return OkStatus();
}

// A call that comes back to itself before any byte, with something pushed each time round, would never end.
// Such calls are edges inside a strongly connected component (Tarjan 1972) of "reached without a byte".
Status Automaton::RefuseLeftRecursion(const Grammar& grammar) const {
  const size_t count = states_.size();
  std::vector<bool> nullable(count);  // can end without a byte
  for (bool changed = true; changed;) {
    changed = false;
    for (size_t state = count; state-- > 0;) {
      if (nullable[state]) continue;
      const StateInfo& info = states_[state];
      nullable[state] =
          info.ends || std::any_of(info.calls.begin(), info.calls.end(), [&](const Call& call) {
            return nullable[static_cast<size_t>(call.start)] && nullable[static_cast<size_t>(call.back)];
          });
      changed = changed || nullable[state];
    }
  }
  std::vector<std::vector<State>> edges(count);
  for (size_t state = 0; state < count; ++state) {
    for (const Call& call : states_[state].calls) {
      edges[state].push_back(call.start);
      if (nullable[static_cast<size_t>(call.start)]) edges[state].push_back(call.back);
    }
  }
  std::vector<int32_t> order(count, -1);
  std::vector<int32_t> low(count);
  std::vector<int32_t> component(count, -1);
  std::vector<State> open;
  std::vector<std::pair<State, size_t>> path;  // state, next edge
  int32_t clock = 0;
  for (size_t root = 0; root < count; ++root) {
    if (order[root] >= 0) continue;
    path.emplace_back(static_cast<State>(root), 0);
    while (!path.empty()) {
      auto& [current, edge] = path.back();
      const auto state = static_cast<size_t>(current);
      if (edge == 0 && order[state] < 0) {
        order[state] = low[state] = clock++;
        open.push_back(current);
      }
      if (edge < edges[state].size()) {
        const auto to = static_cast<size_t>(edges[state][edge++]);
        if (order[to] < 0) {
          path.emplace_back(static_cast<State>(to), 0);
        } else if (component[to] < 0) {
          low[state] = std::min(low[state], order[to]);
        }
        continue;
      }
      if (low[state] == order[state]) {
        State member = kDead;
        do {
          member = open.back();
          open.pop_back();
          component[static_cast<size_t>(member)] = order[state];
        } while (member != static_cast<State>(state));
      }
      path.pop_back();
      if (!path.empty()) {
        const auto parent = static_cast<size_t>(path.back().first);
        low[parent] = std::min(low[parent], low[state]);
      }
    }
  }
  for (size_t state = 0; state < count; ++state) {
    for (const Call& call : states_[state].calls) {
      if (!call.tail && component[state] == component[static_cast<size_t>(call.start)]) {
        return InvalidArgument("rule '{}' begins with itself (left recursion); put the recursion last",
                               grammar.rules[static_cast<size_t>(states_[state].rule)].name);
      }
    }
  }
  return OkStatus();
}

}  // namespace millrace::engine
