#include "server/bench/summary.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <map>

namespace millrace::server {
namespace {

double Ns(uint64_t nanoseconds) { return 1e-9 * static_cast<double>(nanoseconds); }

OrderedJson Spread(const LatencyHistogram& h) {
  if (h.count() == 0) return nullptr;
  OrderedJson spread;
  spread["count"] = h.count();
  spread["mean"] = 1e-9 * h.mean();
  for (const double p : {50.0, 90.0, 95.0, 99.0}) spread[fmt::format("p{:.0f}", p)] = Ns(h.Percentile(p));
  spread["max"] = Ns(h.Percentile(100));
  return spread;
}

OrderedJson Buckets(const LatencyHistogram& h) {
  OrderedJson buckets = OrderedJson::array();
  h.ForEachBucket([&](uint64_t value, uint64_t count) { buckets.push_back({Ns(value), count}); });
  return buckets;
}

bool IsGood(const RequestResult& r, const Objectives& objectives) {
  if (!r.served()) return false;
  if (objectives.ttft && (r.output_tokens == 0 || Seconds(r.first - r.intended) > *objectives.ttft))
    return false;
  if (objectives.e2e && Seconds(r.end - r.intended) > *objectives.e2e) return false;
  return !objectives.tpot || r.output_tokens < 2 ||
         Seconds(r.end - r.first) / (r.output_tokens - 1) <= *objectives.tpot;
}

struct Figures {
  LatencyHistogram ttft, ttft_from_send, tpot, itl, e2e, e2e_from_send, per_token, queue;
  std::map<std::string, std::pair<int64_t, std::string>> errors;  // kind -> count, an example
  int64_t counted = 0, served = 0, good = 0;
  int64_t prompt_tokens = 0, cached_tokens = 0, output_tokens = 0;
  bool usage = true, per_chunk = true, stops_early = false;
  TimePoint first_due = TimePoint::max();
  TimePoint last_end = TimePoint::min();

  void Add(const RequestResult& r, const Objectives& objectives);
  double window() const { return counted == 0 ? 0 : Seconds(last_end - first_due); }
};

void Figures::Add(const RequestResult& r, const Objectives& objectives) {
  ++counted;
  first_due = std::min(first_due, r.intended);
  last_end = std::max(last_end, r.end);
  queue.Record((r.sent - r.intended).count());
  good += IsGood(r, objectives);
  if (!r.served()) {
    auto& [count, example] = errors[ErrorName(r.error)];
    if (count++ == 0) example = r.message;
    return;
  }
  ++served;
  prompt_tokens += r.prompt_tokens;
  cached_tokens += r.cached_tokens;
  output_tokens += r.output_tokens;
  usage = usage && r.tokens_from_usage;
  per_chunk = per_chunk && r.tokens_per_chunk;
  e2e.Record((r.end - r.intended).count());
  e2e_from_send.Record((r.end - r.sent).count());
  if (r.output_tokens == 0) return;
  ttft.Record((r.first - r.intended).count());
  ttft_from_send.Record((r.first - r.sent).count());
  per_token.Record((r.end - r.intended).count() / r.output_tokens);
  if (r.output_tokens > 1) tpot.Record((r.end - r.first).count() / (r.output_tokens - 1));
  for (const int64_t gap : r.gaps_ns) itl.Record(gap);
}

// Per second since the start: requests due, ended, failed; tokens; running.
OrderedJson Timeline(const LoadResult& run) {
  struct Second {
    int64_t due = 0, served = 0, failed = 0, tokens = 0, running = 0;
  };
  std::map<int64_t, Second> seconds;
  const auto second = [&](TimePoint t) { return static_cast<int64_t>(std::floor(Seconds(t - run.start))); };
  std::map<int64_t, LatencyHistogram> ttft;
  for (const RequestResult& r : run.requests) {
    ++seconds[second(r.intended)].due;
    Second& end = seconds[second(r.end)];
    ++(r.served() ? end.served : end.failed);
    for (int64_t s = second(r.intended); s <= second(r.end); ++s) ++seconds[s].running;
    if (!r.served() || r.output_tokens == 0) continue;
    ttft[second(r.intended)].Record((r.first - r.intended).count());
    TimePoint token = r.first;
    ++seconds[second(token)].tokens;
    for (const int64_t gap : r.gaps_ns) {
      token += Duration(gap);
      ++seconds[second(token)].tokens;
    }
  }
  OrderedJson timeline = OrderedJson::array();
  if (seconds.empty()) return timeline;
  // A second in which nothing happened is a figure too.
  for (int64_t at = seconds.begin()->first, last = seconds.rbegin()->first; at < last; ++at) seconds[at];
  for (const auto& [at, s] : seconds) {
    const auto found = ttft.find(at);
    timeline.push_back(
        {{"second", at},
         {"due", s.due},
         {"served", s.served},
         {"failed", s.failed},
         {"tokens", s.tokens},
         {"running", s.running},
         {"ttft_p50", found == ttft.end() ? OrderedJson() : OrderedJson(Ns(found->second.Percentile(50)))},
         {"ttft_p99", found == ttft.end() ? OrderedJson() : OrderedJson(Ns(found->second.Percentile(99)))}});
  }
  return timeline;
}

OrderedJson Client(const LoadResult& run) {
  const ClientHealth& c = run.client;
  return {{"timer_lag", Spread(c.timer_lag)},
          {"send_lag", Spread(c.send_lag)},
          {"cpu_share", c.wall_seconds > 0 ? c.cpu_seconds / c.wall_seconds : 0.0},
          {"cpu_seconds", c.cpu_seconds},
          {"wall_seconds", c.wall_seconds},
          {"connections", c.connections},
          {"in_flight_max", c.in_flight_max},
          {"interrupted", run.interrupted}};
}

// Two-sided 95 % quantile of Student's t.
double StudentT(size_t degrees) {
  static constexpr std::array<double, 10> kQuantiles = {12.706, 4.303, 3.182, 2.776, 2.571,
                                                        2.447,  2.365, 2.306, 2.262, 2.228};
  return degrees <= kQuantiles.size() ? kQuantiles[degrees - 1] : 1.96;
}

OrderedJson IntervalOf(const std::vector<double>& values) {
  const auto n = static_cast<double>(values.size());
  double mean = 0, squares = 0;
  for (const double v : values) mean += v / n;
  for (const double v : values) squares += (v - mean) * (v - mean);
  const double half = StudentT(values.size() - 1) * std::sqrt(squares / (n - 1) / n);
  return {{"mean", mean}, {"low", mean - half}, {"high", mean + half}};
}

}  // namespace

StatusOr<Objectives> ParseObjectives(const std::string& text) {
  Objectives objectives;
  size_t begin = 0;
  while (begin < text.size()) {
    const size_t end = std::min(text.find(',', begin), text.size());
    const std::string item = text.substr(begin, end - begin);
    begin = end + 1;
    const size_t equals = item.find('=');
    const std::string name = item.substr(0, equals);
    std::optional<double>* target = name == "ttft"   ? &objectives.ttft
                                    : name == "tpot" ? &objectives.tpot
                                    : name == "e2e"  ? &objectives.e2e
                                                     : nullptr;
    char* unit = nullptr;
    const std::string value = equals == std::string::npos ? "" : item.substr(equals + 1);
    const double number = std::strtod(value.c_str(), &unit);
    const bool milliseconds = std::string_view(unit) == "ms";
    if (target == nullptr || number <= 0 || unit == value.c_str() ||
        (!milliseconds && std::string_view(unit) != "s")) {
      return InvalidArgument("--objectives '{}': write e.g. ttft=200ms,tpot=50ms,e2e=10s", item);
    }
    *target = milliseconds ? number / 1000 : number;
  }
  return objectives;
}

OrderedJson Summarise(const LoadResult& run, double warmup_seconds, const Objectives& objectives) {
  const TimePoint begin = run.start + Duration(static_cast<int64_t>(warmup_seconds * 1e9));
  Figures f;
  int64_t warmup = 0;
  for (const RequestResult& r : run.requests) {
    if (r.intended < begin) {
      ++warmup;
    } else {
      f.Add(r, objectives);
    }
  }
  const double window = f.window();
  const auto rate = [&](int64_t count) { return window > 0 ? static_cast<double>(count) / window : 0.0; };
  const auto mean = [&](int64_t sum) {
    return f.served > 0 ? static_cast<double>(sum) / static_cast<double>(f.served) : 0.0;
  };
  OrderedJson s;
  s["requests"] = {
      {"counted", f.counted}, {"served", f.served}, {"failed", f.counted - f.served}, {"warmup", warmup}};
  s["errors"] = OrderedJson::object();
  for (const auto& [kind, entry] : f.errors)
    s["errors"][kind] = {{"count", entry.first}, {"example", entry.second}};
  s["window_seconds"] = window;
  s["throughput"] = {{"requests_per_second", rate(f.served)},
                     {"output_tokens_per_second", rate(f.output_tokens)},
                     {"total_tokens_per_second", rate(f.output_tokens + f.prompt_tokens)}};
  if (objectives.any()) {
    s["goodput"] = {
        {"share", f.counted > 0 ? static_cast<double>(f.good) / static_cast<double>(f.counted) : 0.0},
        {"requests_per_second", rate(f.good)}};
  }
  const bool known = f.per_chunk && f.served > 0;
  s["latency"] = {{"ttft", Spread(f.ttft)},
                  {"tpot", Spread(f.tpot)},
                  {known ? "itl" : "inter_chunk", Spread(f.itl)},
                  {"e2e", Spread(f.e2e)},
                  {"per_token", Spread(f.per_token)},
                  {"queue", Spread(f.queue)},
                  {"ttft_from_send", Spread(f.ttft_from_send)},
                  {"e2e_from_send", Spread(f.e2e_from_send)}};
  s["tokens"] = {{"counted_by", known     ? "usage of every chunk"
                                : f.usage ? "usage at the end"
                                          : "chunks"},
                 {"prompt_mean", mean(f.prompt_tokens)},
                 {"cached_mean", mean(f.cached_tokens)},
                 {"output_mean", mean(f.output_tokens)}};
  s["client"] = Client(run);
  s["histograms"] = {{"ttft", Buckets(f.ttft)}, {"itl", Buckets(f.itl)}, {"e2e", Buckets(f.e2e)}};
  s["timeline"] = Timeline(run);
  return s;
}

OrderedJson Intervals(const std::vector<OrderedJson>& runs) {
  if (runs.size() < 2) return nullptr;
  OrderedJson result = OrderedJson::object();
  for (const auto& [key, value] : runs.front().items()) {
    if (key == "histograms" || key == "timeline" || key == "client" || key == "errors") continue;
    std::vector<OrderedJson> same;
    for (const OrderedJson& run : runs) {
      if (run.contains(key)) same.push_back(run[key]);
    }
    if (same.size() != runs.size()) continue;
    if (value.is_object()) {
      const bool all =
          std::all_of(same.begin(), same.end(), [](const OrderedJson& v) { return v.is_object(); });
      if (all) result[key] = Intervals(same);
    } else if (value.is_number()) {
      std::vector<double> values;
      for (const OrderedJson& v : same) values.push_back(v.is_number() ? v.get<double>() : 0.0);
      result[key] = IntervalOf(values);
    }
  }
  return result;
}

}  // namespace millrace::server
