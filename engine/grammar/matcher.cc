#include "engine/grammar/matcher.h"

#include <algorithm>

namespace millrace::engine {

int32_t Matcher::Push(int32_t stack, Automaton::State back) {
  const uint64_t key = uint64_t{static_cast<uint32_t>(stack)} << 32 | static_cast<uint32_t>(back);
  const auto [found, added] = known_.try_emplace(key, static_cast<int32_t>(frames_.size()));
  if (added) frames_.push_back({stack, back});
  return found->second;
}

// Adds `config` and all that it reaches without a byte. Left recursion was refused, so this ends.
void Matcher::Enter(Config config, Configs* out) {
  pending_.push_back(config);
  while (!pending_.empty()) {
    const Config current = pending_.back();
    pending_.pop_back();
    if (std::find(out->list.begin(), out->list.end(), current) != out->list.end()) continue;
    if (out->list.size() >= kConfigsMax) continue;
    out->list.push_back(current);
    for (const Automaton::Call& call : automaton_.CallsOf(current.state))
      pending_.push_back({call.start, call.tail ? current.stack : Push(current.stack, call.back)});
    if (!automaton_.ends(current.state)) continue;
    if (current.stack == 0) {
      out->ends = true;
    } else {
      const Frame frame = frames_[static_cast<size_t>(current.stack)];
      pending_.push_back({frame.back, frame.parent});
    }
  }
}

void Matcher::Tidy(Configs* out) { std::sort(out->list.begin(), out->list.end()); }

Configs Matcher::Start() {
  Configs out;
  Enter({automaton_.start(), 0}, &out);
  Tidy(&out);
  return out;
}

void Matcher::Step(const Configs& from, uint8_t byte, Configs* out) {
  out->list.clear();
  out->ends = false;
  for (const Config& config : from.list) {
    const Automaton::State next = automaton_.Next(config.state, byte);
    if (next != Automaton::kDead) Enter({next, config.stack}, out);
  }
  if (out->list.size() > 1) Tidy(out);
}

Configs Matcher::Return(int32_t stack) {
  Configs out;
  if (stack == 0) return out;
  const Frame frame = frames_[static_cast<size_t>(stack)];
  Enter({frame.back, frame.parent}, &out);
  Tidy(&out);
  return out;
}

}  // namespace millrace::engine
