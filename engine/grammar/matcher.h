#pragma once
// One run of an automaton: all ways in which the bytes so far can be the beginning of a match.

#include <cstdint>
#include <span>
#include <unordered_map>
#include <vector>

#include "engine/grammar/automaton.h"

namespace millrace::engine {

// A way to read the bytes so far. Stacks are numbers of their Matcher, equal exactly when the stacks are.
struct Config {
  Automaton::State state = 0;
  int32_t stack = 0;  // 0 is the empty stack
  auto operator<=>(const Config&) const = default;
};

// Sorted, without repeats: calls are entered and returns are taken already.
struct Configs {
  std::vector<Config> list;
  bool ends = false;  // the bytes so far are a match
  bool operator==(const Configs&) const = default;
};

// One thread at a time. The automaton outlives it.
class Matcher {
 public:
  explicit Matcher(const Automaton& automaton) : automaton_(automaton), frames_(1) {}

  // Before the first byte.
  Configs Start();
  // After one more byte: *out, which is empty when nothing fits (`ends` may still say that the match was
  // over). More than kConfigsMax ways are cut to the first: what goes on still fits the grammar.
  void Step(const Configs& from, uint8_t byte, Configs* out);
  static constexpr size_t kConfigsMax = 256;
  // Where the run goes on when the rule on top of `stack` has ended. Empty for the empty stack.
  Configs Return(int32_t stack);

 private:
  struct Frame {
    int32_t parent = 0;
    Automaton::State back = 0;
  };
  int32_t Push(int32_t stack, Automaton::State back);
  void Enter(Config config, Configs* out);
  static void Tidy(Configs* out);

  const Automaton& automaton_;
  std::vector<Frame> frames_;                    // 0 is the empty stack
  std::unordered_map<uint64_t, int32_t> known_;  // (parent, back) -> frame
  std::vector<Config> pending_;
};

}  // namespace millrace::engine
