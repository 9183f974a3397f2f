#include "engine/grammar/state_classes.h"

#include <algorithm>
#include <map>
#include <tuple>
#include <utility>

namespace millrace::engine {
namespace {

using State = Automaton::State;

class Refinement {
 public:
  explicit Refinement(const Automaton& automaton)
      : automaton_(automaton), letters_(automaton.Letters()), class_of_(automaton.num_states()) {
    const size_t count = automaton.num_states();
    std::map<std::pair<bool, std::vector<std::tuple<State, State, bool>>>, int32_t> kinds;
    for (size_t i = 0; i < count; ++i) {
      const auto state = static_cast<State>(i);
      std::vector<std::tuple<State, State, bool>> calls;
      for (const Automaton::Call& call : automaton.CallsOf(state))
        calls.emplace_back(call.start, call.back, call.tail);
      const auto next = static_cast<int32_t>(kinds.size());
      class_of_[i] = kinds.try_emplace({automaton.ends(state), std::move(calls)}, next).first->second;
    }
    members_of_.resize(kinds.size());
    for (const int32_t of : class_of_) ++members_of_[static_cast<size_t>(of)];
    for (size_t i = 0; i < count; ++i) {
      for (const uint8_t letter : letters_) {
        const State to = automaton.Next(static_cast<State>(i), letter);
        if (to != Automaton::kDead) edges_.emplace_back(to, static_cast<State>(i));
      }
    }
    std::sort(edges_.begin(), edges_.end());
    edges_.erase(std::unique(edges_.begin(), edges_.end()), edges_.end());
    for (size_t i = 0; i < count; ++i) changed_.push_back(static_cast<State>(i));
  }

  // States of one class stay together if every byte leads them to one class. Whoever has no successor that
  // changed its class goes on as before with all others of whom that is true, and keeps the class's number.
  // False when nothing is left to split.
  bool Round() {
    std::vector<State> touched;
    if (first_) {
      touched = changed_;  // also those without predecessors or successors
      first_ = false;
    } else {
      for (const State to : changed_) {
        auto edge = std::lower_bound(edges_.begin(), edges_.end(), std::pair(to, State{0}));
        for (; edge != edges_.end() && edge->first == to; ++edge) touched.push_back(edge->second);
      }
      std::sort(touched.begin(), touched.end());
      touched.erase(std::unique(touched.begin(), touched.end()), touched.end());
    }
    std::map<std::vector<int32_t>, std::vector<State>> groups;  // by own class, then those of the successors
    std::map<int32_t, int32_t> touched_of;                      // class -> how many of it
    std::vector<int32_t> key;
    for (const State state : touched) {
      key.assign(1, ClassOf(state));
      for (const uint8_t letter : letters_) {
        const State to = automaton_.Next(state, letter);
        key.push_back(to == Automaton::kDead ? -1 : ClassOf(to));
      }
      groups[key].push_back(state);
      ++touched_of[key[0]];
    }
    changed_.clear();
    std::vector<std::pair<int32_t, std::vector<State>>> moved;
    for (auto& [signature, states] : groups) {
      const int32_t from = signature[0];
      int32_t& rest = touched_of[from];
      // All of the class were touched: the first group stays what it was.
      if (rest == members_of_[static_cast<size_t>(from)]) {
        rest = -1;
        continue;
      }
      moved.emplace_back(from, std::move(states));
    }
    for (auto& [from, states] : moved) {
      const auto fresh = static_cast<int32_t>(members_of_.size());
      members_of_.push_back(static_cast<int32_t>(states.size()));
      members_of_[static_cast<size_t>(from)] -= static_cast<int32_t>(states.size());
      for (const State state : states) class_of_[static_cast<size_t>(state)] = fresh;
      changed_.insert(changed_.end(), states.begin(), states.end());
    }
    return !changed_.empty();
  }

  std::vector<int32_t> Take() { return std::move(class_of_); }

 private:
  int32_t ClassOf(State state) const { return class_of_[static_cast<size_t>(state)]; }

  const Automaton& automaton_;
  const std::vector<uint8_t> letters_;
  std::vector<std::pair<State, State>> edges_;  // (to, from), sorted
  std::vector<int32_t> class_of_;
  std::vector<int32_t> members_of_;  // how many states each class has
  std::vector<State> changed_;       // to a new class, in the last round
  bool first_ = true;
};

}  // namespace

std::vector<int32_t> ClassesOfStates(const Automaton& automaton, int32_t bytes) {
  Refinement refinement(automaton);
  for (int32_t round = 0; round < bytes && refinement.Round(); ++round) {
  }
  return refinement.Take();
}

}  // namespace millrace::engine
