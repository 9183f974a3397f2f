#pragma once
// A grammar compiled for matching: each rule a deterministic automaton over bytes and rule calls, so that a
// run is a set of (state, stack of return states). Built by Thompson's construction and the subset
// construction (Aho, Hopcroft, Ullman), with calls as letters of their own.

#include <array>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "base/status.h"
#include "engine/grammar/grammar.h"

namespace millrace::engine {

// Immutable; any thread.
class Automaton {
 public:
  using State = int32_t;
  static constexpr State kDead = -1;

  struct Call {
    State start;  // of the rule that is called
    State back;   // where the caller goes on
    bool tail;    // `back` can only return: nothing need be remembered
  };

  // InvalidArgument names the rule that recurses on its left or can never end; ResourceExhausted when the
  // automaton would have more than kStatesMax states.
  static StatusOr<std::unique_ptr<const Automaton>> Build(const Grammar& grammar);
  static constexpr size_t kStatesMax = 32'768;

  State start() const { return 0; }
  size_t num_states() const { return states_.size(); }
  size_t bytes() const;  // of memory, roughly
  // Every state can reach the end of its rule: what is not dead can be completed.
  State Next(State state, uint8_t byte) const {
    return next_[static_cast<size_t>(state) * num_classes_ + class_of_[byte]];
  }
  std::span<const Call> CallsOf(State state) const { return states_[static_cast<size_t>(state)].calls; }
  // One byte of each class of bytes that no state tells apart.
  std::vector<uint8_t> Letters() const;
  bool ends(State state) const { return states_[static_cast<size_t>(state)].ends; }  // of its rule

 private:
  struct StateInfo {
    std::vector<Call> calls;
    bool ends = false;
    int32_t rule = 0;
  };
  class Builder;
  Automaton() = default;
  bool HasByteEdge(State state) const;
  Status Prune(const Grammar& grammar);
  Status RefuseLeftRecursion(const Grammar& grammar) const;

  std::array<uint8_t, 256> class_of_{};  // bytes that no expression tells apart share a class
  size_t num_classes_ = 0;
  std::vector<State> next_;  // [num_states, num_classes]
  std::vector<StateInfo> states_;
};

}  // namespace millrace::engine
