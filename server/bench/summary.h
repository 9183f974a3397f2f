#pragma once
// From what came back to figures. A report is one JSON document: the table, the page and the comparison all
// read it.

#include <optional>
#include <string>
#include <vector>

#include "base/json.h"
#include "server/bench/load.h"

namespace millrace::server {

// A request is good when it was served and meets all that are set. Seconds; time runs from when it was due.
struct Objectives {
  std::optional<double> ttft;
  std::optional<double> tpot;
  std::optional<double> e2e;
  bool any() const { return ttft.has_value() || tpot.has_value() || e2e.has_value(); }
};
// "ttft=200ms,tpot=50ms,e2e=10s"
StatusOr<Objectives> ParseObjectives(const std::string& text);

// Figures of one run. Requests due during the warm-up are left out; failed ones are counted by kind and enter
// no latency. Definitions, also in the report:
//   ttft        first token (reasoning and tool calls included) minus when the request was due
//   tpot        (end - first token) / (output tokens - 1), of each request with two tokens or more
//   itl         every gap between two tokens; "inter_chunk" when the server does not say how many tokens a
//   chunk holds e2e         end minus when the request was due per_token   e2e / output tokens queue first
//   byte sent minus when the request was due: the client's own delay
//   *_from_send the same with time running from the first byte sent
OrderedJson Summarise(const LoadResult& run, double warmup_seconds, const Objectives& objectives);

// Mean and 95 % confidence interval (Student's t over the repetitions) of every number that all runs have at
// the same place: {"mean", "low", "high"}. One run: null.
OrderedJson Intervals(const std::vector<OrderedJson>& runs);

// Lines about a run whose client was the bottleneck, or whose figures need care. Empty: none.
std::vector<std::string> Warnings(const OrderedJson& summary);

// The table of one run, and the lines that say what its words mean.
std::string Table(const OrderedJson& summary, const OrderedJson& intervals);

// A self-contained page.
std::string HtmlPage(const OrderedJson& report);

// Two reports side by side: difference of every figure, and whether it is outside both confidence intervals.
StatusOr<std::string> Compare(const std::string& path_a, const std::string& path_b);

}  // namespace millrace::server
