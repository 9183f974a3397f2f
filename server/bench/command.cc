#include "server/bench/command.h"

#include <signal.h>
#include <unistd.h>

#include <atomic>
#include <cmath>
#include <fstream>
#include <limits>

#include "server/bench/load.h"
#include "server/bench/summary.h"

namespace millrace::server {
namespace {

std::atomic<bool> g_interrupted{false};  // set by the signal handler

// One line on a terminal, written over; elsewhere one every ten seconds.
class LiveView {
 public:
  explicit LiveView(std::string load) : load_(std::move(load)) {}
  void operator()(const LoadProgress& p) {
    const bool terminal = isatty(STDERR_FILENO) != 0;
    if (!terminal && p.seconds < shown_ + 10) return;
    shown_ = p.seconds;
    const std::string line = fmt::format(
        "{}  {:.0f} s: {} sent, {} running, {} served, {} failed, {:.0f} tok/s, TTFT {:.0f}/{:.0f} ms, ITL "
        "{:.1f}/{:.1f} ms "
        "(P50/P99)",
        load_, p.seconds, p.started, p.in_flight, p.served, p.failed,
        p.seconds > 0 ? static_cast<double>(p.tokens) / p.seconds : 0.0, 1e3 * p.ttft_p50, 1e3 * p.ttft_p99,
        1e3 * p.itl_p50, 1e3 * p.itl_p99);
    fmt::print(stderr, "{}{}{}", terminal ? "\r\033[K" : "", line, terminal ? "" : "\n");
    std::fflush(stderr);
  }
  ~LiveView() {
    if (isatty(STDERR_FILENO) != 0) fmt::print(stderr, "\r\033[K");
  }

 private:
  const std::string load_;
  double shown_ = 0;
};

class Bench {
 public:
  Bench(const BenchCommandOptions& options, std::string command_line)
      : options_(options), command_line_(std::move(command_line)) {}

  // Prints, and writes the report, also when it ends early.
  StatusOr<bool> Run();  // whether every request was served

 private:
  Status Prepare();
  Status Sweep();
  Status Search();
  StatusOr<const OrderedJson*> Level(const std::string& name, double value, const WorkloadOptions& workload,
                                     int32_t users);
  StatusOr<const OrderedJson*> RateLevel(double rate);
  Status WriteReport() const;

  const BenchCommandOptions& options_;
  const std::string command_line_;
  LoadOptions load_;
  Objectives objectives_;
  OrderedJson report_;
  bool all_served_ = true;
};

Status Bench::Prepare() {
  const int kinds = !options_.rates.empty() + !options_.users.empty() + !options_.trace.empty();
  if (kinds > 1) return InvalidArgument("--rate, --users and --trace exclude each other");
  if (options_.trace.empty() && options_.requests == 0 && options_.duration == 0) {
    return InvalidArgument("give --requests, --duration or both: nothing else would end the test");
  }
  MR_ASSIGN_OR_RETURN(objectives_, ParseObjectives(options_.objectives));
  if (options_.search && (!objectives_.any() || options_.rates.size() != 1 || options_.duration == 0)) {
    return InvalidArgument("--search needs --objectives, --duration and one --rate to start from");
  }
  MR_ASSIGN_OR_RETURN(load_.target, ParseTarget(options_.url));
  if (!options_.metrics_url.empty()) MR_RETURN_IF_ERROR(ParseTarget(options_.metrics_url).status());
  load_.target.model = options_.model;
  load_.target.api_key = options_.api_key;
  load_.target.ca_file = options_.ca_file;
  load_.target.insecure = options_.insecure;
  load_.target.chat = options_.endpoint == "chat";
  load_.target.stream = !options_.no_stream;
  WorkloadOptions& w = load_.workload;
  MR_ASSIGN_OR_RETURN(w.input_tokens, ParseIntRange("--input-tokens", options_.input_tokens, 1));
  MR_ASSIGN_OR_RETURN(w.output_tokens, ParseIntRange("--output-tokens", options_.output_tokens, 1));
  MR_ASSIGN_OR_RETURN(w.turns, ParseIntRange("--turns", options_.turns, 1));
  w.burstiness = options_.constant ? std::numeric_limits<double>::infinity() : options_.burstiness;
  w.ramp_to = options_.ramp_to;
  w.ramp_seconds = options_.ramp;
  w.trace = options_.trace;
  w.trace_speed = options_.trace_speed;
  w.prefix_pools = options_.prefix_pools;
  w.prefix_tokens = options_.prefix_tokens;
  load_.think_seconds = options_.think;
  load_.requests_max = options_.requests;
  load_.duration_seconds = options_.duration;
  load_.warmup_seconds = options_.warmup;
  load_.grace_seconds = options_.grace;
  load_.request_timeout_seconds = options_.request_timeout;
  load_.connections_max = options_.connections_max;
  load_.temperature = options_.temperature;
  load_.ignore_eos = !options_.respect_eos;
  auto body = ParseOrderedJson(options_.body);
  if (!body.ok()) return Annotate(body.status(), "--body");
  if (!body->is_object()) return InvalidArgument("--body: a JSON object is expected");
  load_.extra_body = *std::move(body);
  MR_ASSIGN_OR_RETURN(load_.calibration, Calibrate(&load_.target));
  report_ = {{"tool", "millrace bench"},
             {"version", MILLRACE_VERSION},
             {"command", command_line_},
             {"url", options_.url},
             {"model", load_.target.model},
             {"endpoint", options_.endpoint},
             {"stream", load_.target.stream},
             {"seed", options_.seed},
             {"warmup_seconds", options_.warmup},
             {"objectives", options_.objectives},
             {"tokens_per_word", load_.calibration.tokens_per_word},
             {"levels", OrderedJson::array()}};
  return OkStatus();
}

// Runs one load `repeat` times, with other seeds, and adds it to the report. The level belongs to the report.
StatusOr<const OrderedJson*> Bench::Level(const std::string& name, double value,
                                          const WorkloadOptions& workload, int32_t users) {
  LoadOptions load = load_;
  load.workload = workload;
  load.users = users;
  OrderedJson level = {{"load", name}, {"value", value}, {"runs", OrderedJson::array()}};
  std::vector<OrderedJson> runs;
  for (int32_t i = 0; i < options_.repeat && !g_interrupted; ++i) {
    load.workload.seed = options_.seed + static_cast<uint64_t>(i);
    LiveView view(options_.repeat > 1 ? fmt::format("{} ({} of {})", name, i + 1, options_.repeat) : name);
    const PhaseTotals before = ReadPhases(load.target, options_.metrics_url);
    MR_ASSIGN_OR_RETURN(const LoadResult result,
                        RunLoad(load, std::ref(view), [] { return g_interrupted.load(); }));
    runs.push_back(Summarise(result, options_.warmup, objectives_));
    OrderedJson phases = PhasesBetween(before, ReadPhases(load.target, options_.metrics_url));
    if (!phases.is_null()) {
      runs.back()["server_phases"] = std::move(phases);
    } else if (!options_.metrics_url.empty()) {
      fmt::print(stderr, "{}: no phases of requests there\n", options_.metrics_url);
    }
    all_served_ = all_served_ && !result.interrupted && runs.back()["requests"]["failed"] == 0 &&
                  runs.back()["requests"]["served"] != 0;
  }
  level["intervals"] = Intervals(runs);
  for (OrderedJson& run : runs) level["runs"].push_back(std::move(run));
  if (level["runs"].empty()) return Cancelled("interrupted");
  fmt::print("{}\n{}\n", name, Table(level["runs"][0], level["intervals"]));
  std::fflush(stdout);
  report_["levels"].push_back(std::move(level));
  return &report_["levels"].back();
}

StatusOr<const OrderedJson*> Bench::RateLevel(double rate) {
  WorkloadOptions workload = load_.workload;
  workload.arrival = WorkloadOptions::Arrival::kRate;
  workload.rate = rate;
  return Level(fmt::format("{:g} requests/s", rate), rate, workload, 1);
}

Status Bench::Sweep() {
  WorkloadOptions workload = load_.workload;
  if (!options_.trace.empty()) {
    workload.arrival = WorkloadOptions::Arrival::kTrace;
    return Level("trace " + options_.trace, options_.trace_speed, workload, 1).status();
  }
  for (const double rate : options_.rates) {
    if (!g_interrupted) MR_RETURN_IF_ERROR(RateLevel(rate).status());
  }
  if (!options_.rates.empty()) return OkStatus();
  workload.arrival = WorkloadOptions::Arrival::kUsers;
  for (const int32_t users : options_.users.empty() ? std::vector<int32_t>{1} : options_.users) {
    if (!g_interrupted)
      MR_RETURN_IF_ERROR(Level(fmt::format("{} users", users), users, workload, users).status());
  }
  return OkStatus();
}

// The highest rate whose share of good requests is at least --goodput, to 5 %: doubling, then halving the
// interval.
Status Bench::Search() {
  double good = 0, bad = 0, rate = options_.rates.front();
  for (int step = 0; step < 20 && !g_interrupted && (bad == 0 || good == 0 || bad / good > 1.05); ++step) {
    MR_ASSIGN_OR_RETURN(const OrderedJson* level, RateLevel(rate));
    const OrderedJson& intervals = (*level)["intervals"];
    const double share = intervals.is_object() ? intervals["goodput"]["share"]["mean"].get<double>()
                                               : (*level)["runs"][0]["goodput"]["share"].get<double>();
    (share >= options_.goodput ? good : bad) = rate;
    rate = bad == 0 ? rate * 2 : good == 0 ? rate / 2 : std::sqrt(good * bad);
  }
  report_["search"] = {{"goodput", options_.goodput}, {"best_rate", good}, {"failing_rate", bad}};
  if (good == 0) {
    fmt::print("no rate down to {:g} requests/s met the objectives\n", bad);
  } else {
    fmt::print("highest rate with {:.1f} % good requests: {:.3g} requests/s ({:.3g} failed)\n",
               100 * options_.goodput, good, bad);
  }
  return OkStatus();
}

Status Bench::WriteReport() const {
  const auto write = [](const std::string& path, const std::string& text) {
    std::ofstream file(path, std::ios::binary);
    file << text;
    file.close();
    return file ? OkStatus() : Unavailable("{}: cannot be written", path);
  };
  if (!options_.json.empty()) MR_RETURN_IF_ERROR(write(options_.json, DumpJson(report_) + "\n"));
  if (!options_.html.empty()) MR_RETURN_IF_ERROR(write(options_.html, HtmlPage(report_)));
  return OkStatus();
}

StatusOr<bool> Bench::Run() {
  MR_RETURN_IF_ERROR(Prepare());
  fmt::print("{} at {}, {:.2f} tokens per word{}\n\n", load_.target.model, options_.url,
             load_.calibration.tokens_per_word,
             load_.calibration.counted ? "" : " (assumed: the server gives no usage)");
  const Status status = options_.search ? Search() : Sweep();
  if (!report_["levels"].empty()) MR_RETURN_IF_ERROR(WriteReport());
  MR_RETURN_IF_ERROR(status);
  return all_served_;
}

}  // namespace

CLI::App* AddBench(CLI::App& app, BenchCommandOptions& o) {
  CLI::App* c = app.add_subcommand("bench", "Load-test an OpenAI-compatible server");
  c->fallthrough();
  c->get_formatter()->column_width(34);
  c->footer(
      "Time runs from when a request was due, not from when it could be sent. Failed requests enter no "
      "latency.\n"
      "Exit status: 0 all served, 1 some failed (the results so far are printed), 2 no results.");
  c->add_option("--url", o.url, "Server: http://, https://, or a Millrace gateway's grpc:// or grpcs://")
      ->capture_default_str();
  c->add_option("--model", o.model, "Model name (default: the first that the server lists)");
  c->add_option("--api-key", o.api_key, "Sent as bearer token")->envname("MILLRACE_BENCH_API_KEY");
  c->add_option("--metrics-url", o.metrics_url,
                "Where a Millrace gateway shows its metrics, with the path (default: /metrics of --url)");
  c->add_option("--cacert", o.ca_file, "PEM file of the certificates to trust (default: the system's)");
  c->add_flag("--insecure", o.insecure, "Take any certificate");
  c->add_option("--endpoint", o.endpoint, "chat or completions")
      ->check(CLI::IsMember({"chat", "completions"}))
      ->capture_default_str();
  c->add_flag("--no-stream", o.no_stream, "Ask for whole answers");
  c->add_option("--rate", o.rates, "Conversations begun per second; several values, with commas: a sweep")
      ->delimiter(',')
      ->check(CLI::PositiveNumber);
  c->add_option("--users", o.users, "Closed loop: so many conversations at once; several: a sweep")
      ->delimiter(',')
      ->check(CLI::PositiveNumber);
  c->add_option("--trace", o.trace,
                "JSON lines: Mooncake's format, or {\"at\", \"input_tokens\", \"output_tokens\"}");
  c->add_option("--trace-speed", o.trace_speed, "2 = twice as fast")
      ->check(CLI::PositiveNumber)
      ->capture_default_str();
  c->add_flag("--constant", o.constant, "Equal intervals instead of random ones");
  c->add_option("--burstiness", o.burstiness,
                "Gamma shape of the intervals: 1 Poisson, less in bursts, more regular")
      ->check(CLI::PositiveNumber)
      ->capture_default_str();
  c->add_option("--ramp-to", o.ramp_to, "Rate at the end of --ramp")->check(CLI::PositiveNumber);
  c->add_option("--ramp", o.ramp, "Seconds in which the rate changes linearly")
      ->check(CLI::NonNegativeNumber)
      ->needs("--ramp-to");
  c->add_option("--input-tokens", o.input_tokens, "Of each turn: N or LOW:HIGH")->capture_default_str();
  c->add_option("--output-tokens", o.output_tokens, "Likewise")->capture_default_str();
  c->add_option("--turns", o.turns, "Of a conversation: N or LOW:HIGH; each turn sends what was said before")
      ->capture_default_str();
  c->add_option("--think", o.think, "Seconds between an answer and the next turn")
      ->check(CLI::NonNegativeNumber)
      ->capture_default_str();
  c->add_option("--prefix-pools", o.prefix_pools,
                "Number of texts of which every conversation begins with one")
      ->check(CLI::NonNegativeNumber)
      ->capture_default_str();
  c->add_option("--prefix-tokens", o.prefix_tokens, "Length of those texts")
      ->check(CLI::PositiveNumber)
      ->capture_default_str();
  c->add_option("--seed", o.seed, "Equal seeds ask the same")->capture_default_str();
  c->add_option("--requests", o.requests, "End after so many")->check(CLI::NonNegativeNumber);
  c->add_option("--duration", o.duration, "End after so many seconds")->check(CLI::NonNegativeNumber);
  c->add_option("--warmup", o.warmup, "Seconds at the start that are not counted")
      ->check(CLI::NonNegativeNumber)
      ->capture_default_str();
  c->add_option("--grace", o.grace, "Seconds that running requests get at the end")
      ->check(CLI::NonNegativeNumber)
      ->capture_default_str();
  c->add_option("--request-timeout", o.request_timeout, "Seconds")
      ->check(CLI::PositiveNumber)
      ->capture_default_str();
  c->add_option("--connections-max", o.connections_max,
                "0 = no bound; else requests wait here, and the wait counts")
      ->check(CLI::NonNegativeNumber)
      ->capture_default_str();
  c->add_option("--repeat", o.repeat, "Runs per load, for confidence intervals")
      ->check(CLI::Range(1, 100))
      ->capture_default_str();
  c->add_option("--temperature", o.temperature, "Of sampling")
      ->check(CLI::NonNegativeNumber)
      ->capture_default_str();
  c->add_flag("--respect-eos", o.respect_eos,
              "Let answers end by themselves instead of sending ignore_eos and min_tokens");
  c->add_option("--body", o.body, "JSON object added to every request")->capture_default_str();
  c->add_option("--objectives", o.objectives, "What makes a request good, e.g. ttft=200ms,tpot=50ms,e2e=10s");
  c->add_flag("--search", o.search, "Find the highest rate, from --rate on, that meets the objectives");
  c->add_option("--goodput", o.goodput, "Share of good requests that --search wants")
      ->check(CLI::Range(0.0, 1.0))
      ->capture_default_str();
  c->add_option("--json", o.json, "Write the report here");
  c->add_option("--html", o.html, "Write the report as a page here");
  CLI::App* compare = c->add_subcommand("compare", "Compare two reports written with --json");
  compare->add_option("first", o.compare_a, "Report")->required();
  compare->add_option("second", o.compare_b, "Report")->required();
  return c;
}

int RunBench(const BenchCommandOptions& options, const CLI::App& command, const std::string& command_line) {
  const auto fail = [](const Status& status) {
    fmt::print(stderr, "millrace bench: {}\n", Message(status));
    return 2;
  };
  if (command.got_subcommand("compare")) {
    const auto text = Compare(options.compare_a, options.compare_b);
    if (!text.ok()) return fail(text.status());
    fmt::print("{}", *text);
    return 0;
  }
  signal(SIGINT, [](int) { g_interrupted = true; });
  signal(SIGPIPE, SIG_IGN);
  const auto served = Bench(options, command_line).Run();
  if (!served.ok()) return fail(served.status());
  return *served ? 0 : 1;
}

}  // namespace millrace::server
