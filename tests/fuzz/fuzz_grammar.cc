// What clients hold answers to: JSON schemas, regular expressions, choices, GBNF. What compiles is walked,
// and a walk through a JSON constraint that may end is JSON.
#include <fuzzer/FuzzedDataProvider.h>

#include "base/json.h"
#include "engine/grammar/automaton.h"
#include "engine/grammar/constraint.h"
#include "engine/grammar/matcher.h"

using namespace millrace;
using namespace millrace::engine;

namespace {

enum class Kind { kSchema, kRegex, kGrammar, kChoice, kWhole, kMaxValue = kWhole };

std::string ConstraintOf(Kind kind, const std::string& text) {
  const std::string quoted = DumpJson(Json(text));
  switch (kind) {
    case Kind::kSchema:
      return R"({"type":"json_schema","schema":)" + text + "}";
    case Kind::kRegex:
      return R"({"type":"regex","pattern":)" + quoted + "}";
    case Kind::kGrammar:
      return R"({"type":"grammar","grammar":)" + quoted + "}";
    case Kind::kChoice:
      return R"({"type":"choice","choices":[)" + quoted + "]}";
    case Kind::kWhole:
      return text;
  }
  return text;
}

// Takes the bytes of `wishes` where they fit, else the first one that does from `likely`, so that walks come
// to an end.
void Walk(const Automaton& automaton, const std::string& wishes, bool json) {
  static constexpr std::string_view kLikely = "\"}]e1,:{[a-0 \ntrufalsn.\\";
  constexpr size_t kStepsMax = 400;
  Matcher matcher(automaton);
  Configs configs = matcher.Start();
  std::string text;
  for (size_t step = 0; step < kStepsMax; ++step) {
    if (configs.ends && json && !ParseJson(text, 2000).ok()) __builtin_trap();
    Configs next;
    bool found = false;
    const auto attempt = [&](uint8_t byte) {
      if (found) return;
      next = {};
      matcher.Step(configs, byte, &next);
      if (next.list.empty() && !next.ends) return;
      found = true;
      text.push_back(static_cast<char>(byte));
    };
    if (step < wishes.size()) attempt(static_cast<uint8_t>(wishes[step]));
    for (const char byte : kLikely) attempt(static_cast<uint8_t>(byte));
    for (int byte = 0; byte < 256; ++byte) attempt(static_cast<uint8_t>(byte));
    if (!found && !configs.ends) __builtin_trap();  // what is not dead can be completed
    if (!found) return;
    configs = std::move(next);
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* bytes, size_t size) {
  FuzzedDataProvider data(bytes, size);
  const auto kind = data.ConsumeEnum<Kind>();
  const std::string wishes = data.ConsumeRandomLengthString(64);
  const std::string constraint = ConstraintOf(kind, data.ConsumeRemainingBytesAsString());
  const auto grammar = BuildGrammar(constraint);
  if (!grammar.ok()) return 0;
  const auto automaton = Automaton::Build(*grammar);
  if (automaton.ok()) Walk(**automaton, wishes, kind == Kind::kSchema);
  return 0;
}
