#pragma once
// Where the time of a request went inside the server, by its own account: the sums and counts of the
// histogram millrace_request_phase_seconds, read before and after a run.

#include <map>
#include <string>
#include <string_view>

#include "base/json.h"

namespace millrace::server {

struct PhaseTotal {
  double seconds = 0;
  double count = 0;
};
using PhaseTotals = std::map<std::string, PhaseTotal>;

// From a page in Prometheus' text format; empty when the server has no such histogram.
PhaseTotals ParsePhases(std::string_view page);

// {phase: {"count", "mean"}} of what was observed in between; null when that is nothing.
OrderedJson PhasesBetween(const PhaseTotals& before, const PhaseTotals& after);

}  // namespace millrace::server
