#include <algorithm>
#include <cmath>

#include "base/file.h"
#include "server/bench/report_page.h"
#include "server/bench/summary.h"

namespace millrace::server {
namespace {

const OrderedJson kNull;

// report["a"]["b"], null where anything on the way is missing.
const OrderedJson& At(const OrderedJson& value, std::initializer_list<const char*> keys) {
  const OrderedJson* at = &value;
  for (const char* key : keys) {
    if (!at->is_object() || !at->contains(key)) return kNull;
    at = &(*at)[key];
  }
  return *at;
}

double Number(const OrderedJson& value, std::initializer_list<const char*> keys) {
  const OrderedJson& found = At(value, keys);
  return found.is_number() ? found.get<double>() : 0.0;
}

// Microseconds to minutes, with three digits.
std::string Time(double seconds) {
  if (seconds < 1e-3) return fmt::format("{:.0f} us", seconds * 1e6);
  if (seconds < 1)
    return fmt::format("{:.{}f} ms", seconds * 1e3, seconds < 0.01 ? 2 : seconds < 0.1 ? 1 : 0);
  return fmt::format("{:.{}f} s", seconds, seconds < 10 ? 2 : 1);
}

struct Row {
  const char* key;
  const char* label;
  const char* meaning;
};
constexpr Row kRows[] = {
    {"ttft", "TTFT", "first token after the request was due"},
    {"tpot", "TPOT", "(end - first token) / (output tokens - 1), per request"},
    {"itl", "ITL", "gap between two tokens; tokens of one chunk share its gap"},
    {"inter_chunk", "inter-chunk",
     "gap between two chunks: the server does not say how many tokens they hold"},
    {"e2e", "E2E", "end of the answer after the request was due"},
    {"per_token", "E2E per token", "E2E / output tokens"},
    {"queue", "client queue", "first byte sent after the request was due"},
    {"ttft_from_send", "TTFT from send", "first token after the first byte was sent"},
    {"e2e_from_send", "E2E from send", "end of the answer after the first byte was sent"},
};

std::string Interval(const OrderedJson& intervals, std::initializer_list<const char*> keys, bool time) {
  const OrderedJson& interval = At(intervals, keys);
  if (!interval.is_object()) return "";
  const double mean = Number(interval, {"mean"}), low = Number(interval, {"low"}),
               high = Number(interval, {"high"});
  if (time) return fmt::format("  {} [{} .. {}]", Time(mean), Time(std::max(low, 0.0)), Time(high));
  return fmt::format("  {:.4g} [{:.4g} .. {:.4g}]", mean, low, high);
}

StatusOr<OrderedJson> ReadReport(const std::string& path) {
  MR_ASSIGN_OR_RETURN(const std::string text, ReadFile(path));
  auto report = ParseOrderedJson(text);
  if (!report.ok()) return Annotate(report.status(), path);
  if (!report->is_object() || !At(*report, {"levels"}).is_array() || At(*report, {"levels"}).empty()) {
    return InvalidArgument("{}: not a report of 'millrace bench'", path);
  }
  return report;
}

void CompareFigure(const OrderedJson& a, const OrderedJson& b, std::initializer_list<const char*> keys,
                   const std::string& label, bool time, std::string* out) {
  const OrderedJson &one = At(a["runs"][0], keys), &two = At(b["runs"][0], keys);
  const OrderedJson &wide_a = At(At(a, {"intervals"}), keys), &wide_b = At(At(b, {"intervals"}), keys);
  if (!one.is_number() || !two.is_number()) return;
  const double x = wide_a.is_object() ? Number(wide_a, {"mean"}) : one.get<double>();
  const double y = wide_b.is_object() ? Number(wide_b, {"mean"}) : two.get<double>();
  std::string verdict = "one run each: no interval";
  if (wide_a.is_object() && wide_b.is_object()) {
    const bool apart = Number(wide_a, {"high"}) < Number(wide_b, {"low"}) ||
                       Number(wide_b, {"high"}) < Number(wide_a, {"low"});
    verdict = apart ? "differs (95 % intervals apart)" : "within the noise";
  }
  const auto show = [time](double v) { return time ? Time(v) : fmt::format("{:.4g}", v); };
  *out += fmt::format("  {:<28}{:>12}{:>12}{:>10}   {}\n", label, show(x), show(y),
                      x > 0 ? fmt::format("{:+.1f} %", 100 * (y / x - 1)) : "-", verdict);
}

}  // namespace

std::vector<std::string> Warnings(const OrderedJson& s) {
  std::vector<std::string> warnings;
  const double cpu = Number(s, {"client", "cpu_share"});
  if (cpu > 0.85)
    warnings.push_back(
        fmt::format("the client used {:.0f} % of its core: it may be the bottleneck", 100 * cpu));
  const double lag = Number(s, {"client", "timer_lag", "p99"});
  if (lag > 0.005) {
    warnings.push_back(fmt::format(
        "the client's timers ran {} late at P99: latencies below that are not to be trusted", Time(lag)));
  }
  const double queue = Number(s, {"latency", "queue", "p99"});
  const double ttft = Number(s, {"latency", "ttft", "p50"});
  if (queue > 0.005 && queue > 0.1 * ttft) {
    warnings.push_back(
        fmt::format("requests left the client {} late at P99 (it is counted in every figure)", Time(queue)));
  }
  if (Number(s, {"requests", "served"}) < 100 && Number(s, {"requests", "served"}) > 0) {
    warnings.push_back(fmt::format("{:.0f} served requests: P99 is little more than the maximum",
                                   Number(s, {"requests", "served"})));
  }
  if (At(s, {"client", "interrupted"}) == true) warnings.push_back("interrupted: these are partial results");
  return warnings;
}

std::string Table(const OrderedJson& s, const OrderedJson& intervals) {
  std::string out = fmt::format(
      "  {:.0f} requests in {:.1f} s: {:.0f} served, {:.0f} failed ({:.0f} more in the warm-up)\n",
      Number(s, {"requests", "counted"}), Number(s, {"window_seconds"}), Number(s, {"requests", "served"}),
      Number(s, {"requests", "failed"}), Number(s, {"requests", "warmup"}));
  const OrderedJson& errors = At(s, {"errors"});
  for (const auto& [kind, error] : errors.items()) {
    out += fmt::format("  failed: {} x {} ({})\n", error["count"].get<int64_t>(), kind,
                       error["example"].get<std::string>());
  }
  const auto throughput = [&](const char* key, const char* label) {
    out += fmt::format("  {:<28}{:>12.4g}{}\n", label, Number(s, {"throughput", key}),
                       Interval(intervals, {"throughput", key}, false));
  };
  throughput("requests_per_second", "requests/s");
  throughput("output_tokens_per_second", "output tokens/s");
  throughput("total_tokens_per_second", "prompt + output tokens/s");
  if (At(s, {"goodput"}).is_object()) {
    out +=
        fmt::format("  {:<28}{:>12.4g}   {:.1f} % of the requests meet the objectives{}\n", "good requests/s",
                    Number(s, {"goodput", "requests_per_second"}), 100 * Number(s, {"goodput", "share"}),
                    Interval(intervals, {"goodput", "requests_per_second"}, false));
  }
  out += fmt::format(
      "  tokens counted by {}: {:.1f} in, {:.1f} out, {:.1f} cached on average\n",
      At(s, {"tokens", "counted_by"}).is_string() ? s["tokens"]["counted_by"].get<std::string>() : "nothing",
      Number(s, {"tokens", "prompt_mean"}), Number(s, {"tokens", "output_mean"}),
      Number(s, {"tokens", "cached_mean"}));
  out += fmt::format("\n  {:<15}{:>10}{:>10}{:>10}{:>10}{:>10}{:>10}\n", "", "mean", "P50", "P90", "P95",
                     "P99", "max");
  for (const Row& row : kRows) {
    if (!At(s, {"latency", row.key}).is_object()) continue;
    out += fmt::format("  {:<15}", row.label);
    for (const char* column : {"mean", "p50", "p90", "p95", "p99", "max"}) {
      out += fmt::format("{:>10}", Time(Number(s, {"latency", row.key, column})));
    }
    const std::string p99 = Interval(intervals, {"latency", row.key, "p99"}, true);
    out += p99.empty() ? "\n" : "   P99 over the repetitions:" + p99 + "\n";
  }
  if (At(s, {"server_phases"}).is_object()) {
    out += "\n  in the server, on average:";
    for (const auto& [phase, figures] : s["server_phases"].items())
      out += fmt::format(" {} {}", phase, Time(Number(figures, {"mean"})));
    out += "\n";
  }
  out += fmt::format(
      "\n  client: {:.0f} % of a core, timers {} late at P99, {:.0f} connections, at most {:.0f} in flight\n",
      100 * Number(s, {"client", "cpu_share"}), Time(Number(s, {"client", "timer_lag", "p99"})),
      Number(s, {"client", "connections"}), Number(s, {"client", "in_flight_max"}));
  for (const std::string& warning : Warnings(s)) out += "  warning: " + warning + "\n";
  return out;
}

std::string HtmlPage(const OrderedJson& report) {
  OrderedJson page = report;
  page["definitions"] = OrderedJson::object();
  for (const Row& row : kRows) page["definitions"][row.key] = {row.label, row.meaning};
  for (OrderedJson& level : page["levels"]) level["warnings"] = Warnings(level["runs"][0]);
  // Inside a script element only "</" could end it.
  std::string json = DumpJson(page);
  for (size_t at = 0; (at = json.find("</", at)) != std::string::npos; at += 3) json.replace(at, 2, "<\\/");
  std::string text(kReportPage);
  constexpr std::string_view kMark = "/*REPORT*/";
  return text.replace(text.find(kMark), kMark.size(), json);
}

StatusOr<std::string> Compare(const std::string& path_a, const std::string& path_b) {
  MR_ASSIGN_OR_RETURN(const OrderedJson a, ReadReport(path_a));
  MR_ASSIGN_OR_RETURN(const OrderedJson b, ReadReport(path_b));
  std::string out = fmt::format("  {:<28}{:>12}{:>12}{:>10}\n", "", "first", "second", "change");
  for (const OrderedJson& level : a["levels"]) {
    const auto other = std::find_if(b["levels"].begin(), b["levels"].end(),
                                    [&](const OrderedJson& l) { return l["load"] == level["load"]; });
    if (other == b["levels"].end()) continue;
    out += fmt::format("{}\n", level["load"].get<std::string>());
    CompareFigure(level, *other, {"throughput", "requests_per_second"}, "requests/s", false, &out);
    CompareFigure(level, *other, {"throughput", "output_tokens_per_second"}, "output tokens/s", false, &out);
    CompareFigure(level, *other, {"goodput", "share"}, "share of good requests", false, &out);
    CompareFigure(level, *other, {"requests", "failed"}, "failed", false, &out);
    for (const Row& row : kRows) {
      for (const char* column : {"p50", "p99"}) {
        CompareFigure(level, *other, {"latency", row.key, column}, fmt::format("{} {}", row.label, column),
                      true, &out);
      }
    }
  }
  if (out.find('\n') == out.size() - 1)
    return InvalidArgument("{} and {} have no load in common", path_a, path_b);
  return out;
}

}  // namespace millrace::server
