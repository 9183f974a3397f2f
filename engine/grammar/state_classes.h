#pragma once
// Which states of an automaton are the same to whoever looks a few bytes ahead. A string of 400 to 500
// characters has a state for each count, but all those that are further from both limits than the longest
// token is long allow the same tokens.

#include <cstdint>
#include <vector>

#include "engine/grammar/automaton.h"

namespace millrace::engine {

// Per state its class: runs that begin with an empty stack in two states of one class are alive and at their
// ends after the same byte strings of at most `bytes` bytes. (The converse need not hold: states that call
// rules are alike only if they make the same calls.) Moore's partition refinement, stopped after `bytes`
// rounds; a round looks only at predecessors of what the round before it split.
std::vector<int32_t> ClassesOfStates(const Automaton& automaton, int32_t bytes);

}  // namespace millrace::engine
