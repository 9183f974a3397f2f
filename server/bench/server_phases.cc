#include "server/bench/server_phases.h"

#include <algorithm>
#include <charconv>

namespace millrace::server {
namespace {

// In the order in which a request passes through them; others follow.
constexpr const char* kOrder[] = {"queue", "grant_wait", "compute",      "post",
                                  "wire",  "commit",     "first_decode", "decode"};
constexpr std::string_view kName = "millrace_request_phase_seconds_";

// The value of `label` in {a="b",c="d"}; phases have no quotes or backslashes in their names.
std::string_view Label(std::string_view line, std::string_view label) {
  const std::string key = std::string(label) + "=\"";
  const size_t found = line.find(key);
  if (found == std::string_view::npos) return {};
  const std::string_view rest = line.substr(found + key.size());
  return rest.substr(0, rest.find('"'));
}

}  // namespace

PhaseTotals ParsePhases(std::string_view page) {
  PhaseTotals totals;
  while (!page.empty()) {
    const size_t end = std::min(page.find('\n'), page.size());
    std::string_view line = page.substr(0, end);
    page.remove_prefix(std::min(end + 1, page.size()));
    if (!line.starts_with(kName)) continue;
    const std::string_view phase = Label(line, "phase");
    const char* const number = line.data() + line.rfind(' ') + 1;
    double value = 0;
    if (phase.empty() || std::from_chars(number, line.data() + line.size(), value).ec != std::errc())
      continue;
    line.remove_prefix(kName.size());
    // Several series of one phase (other labels) add up.
    if (line.starts_with("sum{")) totals[std::string(phase)].seconds += value;
    if (line.starts_with("count{")) totals[std::string(phase)].count += value;
  }
  return totals;
}

OrderedJson PhasesBetween(const PhaseTotals& before, const PhaseTotals& after) {
  OrderedJson phases;
  const auto add = [&](const std::string& phase, const PhaseTotal& total) {
    const auto found = before.find(phase);
    const PhaseTotal start = found == before.end() ? PhaseTotal{} : found->second;
    const double count = total.count - start.count;
    if (count > 0) phases[phase] = {{"count", count}, {"mean", (total.seconds - start.seconds) / count}};
  };
  for (const char* phase : kOrder) {
    if (const auto found = after.find(phase); found != after.end()) add(phase, found->second);
  }
  for (const auto& [phase, total] : after) {
    if (!phases.contains(phase)) add(phase, total);
  }
  return phases;
}

}  // namespace millrace::server
