#include "server/bench/load.h"

#include <sys/resource.h>

#include <algorithm>
#include <boost/asio/co_spawn.hpp>
#include <boost/asio/detached.hpp>
#include <boost/asio/redirect_error.hpp>
#include <boost/asio/steady_timer.hpp>
#include <boost/asio/use_awaitable.hpp>
#include <cmath>
#include <deque>
#include <optional>

#include "server/bench/asker.h"
#include "server/bench/grpc_asker.h"
#include "server/bench/http_asker.h"

namespace millrace::server {

namespace net = boost::asio;

namespace {

constexpr Duration kTick = std::chrono::milliseconds(10);
constexpr Duration kProgressEvery = std::chrono::seconds(1);

TimePoint Now() { return std::chrono::steady_clock::now(); }

Duration FromSeconds(double seconds) { return Duration(static_cast<int64_t>(seconds * 1e9)); }

double ThreadCpuSeconds() {
  rusage usage{};
  getrusage(RUSAGE_THREAD, &usage);
  const auto seconds = [](const timeval& t) {
    return static_cast<double>(t.tv_sec) + 1e-6 * static_cast<double>(t.tv_usec);
  };
  return seconds(usage.ru_utime) + seconds(usage.ru_stime);
}

const char* PathOf(const LoadTarget& target) {
  return target.chat ? "/v1/chat/completions" : "/v1/completions";
}

struct Exchange {
  std::string question;
  std::string answer;
};

// The whole conversation up to `question`, as the API wants it.
std::string RequestBody(const LoadOptions& options, const std::vector<Exchange>& before,
                        const std::string& question, int32_t output_tokens) {
  OrderedJson body;
  body["model"] = options.target.model;
  if (options.target.chat) {
    OrderedJson messages = OrderedJson::array();
    for (const Exchange& exchange : before) {
      messages.push_back({{"role", "user"}, {"content", exchange.question}});
      messages.push_back({{"role", "assistant"}, {"content", exchange.answer}});
    }
    messages.push_back({{"role", "user"}, {"content", question}});
    body["messages"] = std::move(messages);
  } else {
    std::string prompt;
    for (const Exchange& exchange : before) prompt += exchange.question + exchange.answer + "\n";
    body["prompt"] = prompt + question;
  }
  body["max_tokens"] = output_tokens;
  body["temperature"] = options.temperature;
  if (options.ignore_eos) {
    body["ignore_eos"] = true;
    body["min_tokens"] = output_tokens;
  }
  if (options.target.stream) {
    body["stream"] = true;
    body["stream_options"] = {{"include_usage", true}, {"continuous_usage_stats", true}};
  }
  body.update(options.extra_body);
  return DumpJson(body);
}

// Lets a bounded number of requests through, in the order in which they came. The rest waits.
class Gate {
 public:
  Gate(net::io_context& io, int32_t places) : io_(io), places_(places > 0 ? places : INT32_MAX) {}
  net::awaitable<void> Enter() {
    if (places_ > 0) {
      --places_;
      co_return;
    }
    net::steady_timer turn(io_, net::steady_timer::time_point::max());
    waiting_.push_back(&turn);
    boost::system::error_code cancelled;
    co_await turn.async_wait(net::redirect_error(net::use_awaitable, cancelled));
  }
  void Leave() {
    if (waiting_.empty()) {
      ++places_;
      return;
    }
    waiting_.front()->cancel();  // it has our place now
    waiting_.pop_front();
  }

 private:
  net::io_context& io_;
  int32_t places_;
  std::deque<net::steady_timer*> waiting_;
};

class Load {
 public:
  Load(const LoadOptions& options, const std::function<void(const LoadProgress&)>& progress,
       const std::function<bool()>& interrupted)
      : options_(options),
        progress_(progress),
        interrupted_(interrupted),
        gate_(io_, options.connections_max) {}

  LoadResult Run(Workload workload, std::unique_ptr<Asker> asker);
  net::io_context& io() { return io_; }

 private:
  net::awaitable<void> OpenLoop();
  net::awaitable<void> User();
  net::awaitable<void> Converse(PlannedSession session, TimePoint due);
  net::awaitable<void> AskTurn(const PlannedTurn& turn, std::vector<Exchange>* before, RequestResult* result);
  net::awaitable<void> SleepUntil(TimePoint when);
  net::awaitable<void> Watch();
  bool MayStart(TimePoint due);
  void Note(RequestResult result);
  LoadProgress Progress() const;
  std::string Question(const PlannedTurn& turn) const;

  const LoadOptions& options_;
  const std::function<void(const LoadProgress&)>& progress_;
  const std::function<bool()>& interrupted_;
  net::io_context io_{1};
  Gate gate_;
  std::optional<Workload> workload_;
  std::unique_ptr<Asker> asker_;

  LoadResult result_;
  LatencyHistogram ttft_, itl_;
  int64_t started_ = 0, served_ = 0, failed_ = 0, tokens_ = 0, sessions_ = 0;
  int32_t in_flight_ = 0;
  int32_t sources_ = 0;  // loops that may still start requests
  TimePoint last_start_{};
  bool stopped_ = false;
};

net::awaitable<void> Load::SleepUntil(TimePoint when) {
  net::steady_timer timer(io_, std::chrono::time_point_cast<net::steady_timer::duration>(when));
  boost::system::error_code ignored;
  co_await timer.async_wait(net::redirect_error(net::use_awaitable, ignored));
}

bool Load::MayStart(TimePoint due) {
  if (stopped_ || (options_.requests_max > 0 && started_ >= options_.requests_max)) return false;
  return options_.duration_seconds <= 0 || due < result_.start + FromSeconds(options_.duration_seconds);
}

std::string Load::Question(const PlannedTurn& turn) const {
  std::string text;
  for (const PromptPart& part : turn.parts) {
    const double words = part.tokens / options_.calibration.tokens_per_word;
    if (!text.empty()) text += ' ';
    text += PromptText(part.seed, std::max(1, static_cast<int32_t>(std::lround(words))));
  }
  return text;
}

net::awaitable<void> Load::OpenLoop() {
  while (const std::optional<PlannedSession> session = workload_->Next()) {
    const TimePoint due = result_.start + FromSeconds(session->at);
    if (!MayStart(due)) break;
    if (due > Now()) co_await SleepUntil(due);
    if (!MayStart(due)) break;
    net::co_spawn(io_, Converse(*session, due), net::detached);
  }
  --sources_;
}

net::awaitable<void> Load::User() {
  while (MayStart(Now())) {
    const std::optional<PlannedSession> session = workload_->Next();
    if (!session.has_value()) break;
    co_await Converse(*session, Now());
    if (options_.think_seconds > 0) co_await SleepUntil(Now() + FromSeconds(options_.think_seconds));
  }
  --sources_;
}

net::awaitable<void> Load::Converse(PlannedSession session, TimePoint due) {
  const int64_t id = sessions_++;
  std::vector<Exchange> before;
  for (size_t t = 0; t < session.turns.size(); ++t) {
    if (!MayStart(due)) co_return;
    RequestResult result;
    result.session = id;
    result.turn = static_cast<int32_t>(t);
    result.intended = due;
    ++started_;
    ++in_flight_;
    last_start_ = Now();
    result_.client.in_flight_max = std::max(result_.client.in_flight_max, in_flight_);
    co_await AskTurn(session.turns[t], &before, &result);
    --in_flight_;
    const bool goes_on = result.served() && t + 1 < session.turns.size();
    Note(std::move(result));
    if (!goes_on) co_return;
    due = Now() + FromSeconds(options_.think_seconds);
    if (options_.think_seconds > 0) co_await SleepUntil(due);
  }
}

net::awaitable<void> Load::AskTurn(const PlannedTurn& turn, std::vector<Exchange>* before,
                                   RequestResult* result) {
  const std::string question = Question(turn);
  std::string body = RequestBody(options_, *before, question, turn.output_tokens);
  co_await gate_.Enter();
  if (stopped_) {
    gate_.Leave();
    result->sent = result->end = Now();
    result->error = RequestError::kUnfinished;
    result->message = "still waiting for a connection at the end";
    co_return;
  }
  const Asker::Answer answer = co_await asker_->Ask(PathOf(options_.target), std::move(body),
                                                    FromSeconds(options_.request_timeout_seconds), result);
  gate_.Leave();
  if (result->served() && answer.status != 200) {
    result->error = RequestError::kHttp;
    result->message = fmt::format("HTTP {}: {}", answer.status, ErrorMessage(answer.body));
    result->end = Now();
  }
  before->push_back({question, answer.text});
}

void Load::Note(RequestResult result) {
  result_.client.send_lag.Record((result.sent - result.intended).count());
  if (result.served()) {
    ++served_;
    tokens_ += result.output_tokens;
    if (result.output_tokens > 0) ttft_.Record((result.first - result.intended).count());
    for (const int64_t gap : result.gaps_ns) itl_.Record(gap);
  } else {
    ++failed_;
  }
  result_.requests.push_back(std::move(result));
}

LoadProgress Load::Progress() const {
  const auto seconds = [](uint64_t ns) { return 1e-9 * static_cast<double>(ns); };
  LoadProgress p;
  p.seconds = Seconds(Now() - result_.start);
  p.started = started_;
  p.in_flight = in_flight_;
  p.served = served_;
  p.failed = failed_;
  p.tokens = tokens_;
  p.ttft_p50 = seconds(ttft_.Percentile(50));
  p.ttft_p99 = seconds(ttft_.Percentile(99));
  p.itl_p50 = seconds(itl_.Percentile(50));
  p.itl_p99 = seconds(itl_.Percentile(99));
  return p;
}

// Ends the run, tells how it goes, and measures how late this thread's own timers are.
net::awaitable<void> Load::Watch() {
  TimePoint due = Now() + kTick;
  TimePoint tell = Now() + kProgressEvery;
  while (sources_ > 0 || in_flight_ > 0) {
    co_await SleepUntil(due);
    const TimePoint now = Now();
    result_.client.timer_lag.Record((now - due).count());
    due = std::max(due + kTick, now);
    if (now >= tell) {
      tell = now + kProgressEvery;
      progress_(Progress());
    }
    const bool grace_over =
        (sources_ == 0 || !MayStart(now)) && now > last_start_ + FromSeconds(options_.grace_seconds);
    if (!stopped_ && (interrupted_() || grace_over)) {
      result_.interrupted = interrupted_();
      stopped_ = true;
      asker_->Stop();
    }
  }
  progress_(Progress());
}

LoadResult Load::Run(Workload workload, std::unique_ptr<Asker> asker) {
  workload_ = std::move(workload);
  asker_ = std::move(asker);
  const double cpu = ThreadCpuSeconds();
  result_.start = last_start_ = Now();
  if (options_.workload.arrival == WorkloadOptions::Arrival::kUsers) {
    sources_ = options_.users;
    for (int32_t i = 0; i < options_.users; ++i) net::co_spawn(io_, User(), net::detached);
  } else {
    sources_ = 1;
    net::co_spawn(io_, OpenLoop(), net::detached);
  }
  net::co_spawn(io_, Watch(), net::detached);
  io_.run();
  result_.client.cpu_seconds = ThreadCpuSeconds() - cpu;
  result_.client.wall_seconds = Seconds(Now() - result_.start);
  result_.client.connections = asker_->connections();
  return std::move(result_);
}

// One request outside of any load; the io_context is run until it is over.
StatusOr<Asker::Answer> AskOnce(const LoadTarget& target, std::string path, std::string body,
                                RequestResult* result) {
  net::io_context io(1);
  MR_ASSIGN_OR_RETURN(const std::unique_ptr<Asker> asker, Asker::Create(io, target));
  Asker::Answer answer;
  net::co_spawn(
      io,
      [&]() -> net::awaitable<void> {
        answer = co_await asker->Ask(std::move(path), std::move(body), std::chrono::seconds(60), result);
      },
      net::detached);
  io.run();
  if (!result->served()) return Unavailable("{}", result->message);
  if (answer.status != 200) {
    return Unavailable("{}: HTTP {}: {}", target.address.ToString(), answer.status,
                       ErrorMessage(answer.body));
  }
  return answer;
}

StatusOr<std::string> FirstModel(const LoadTarget& target) {
  RequestResult result;
  MR_ASSIGN_OR_RETURN(const Asker::Answer answer, AskOnce(target, "/v1/models", "", &result));
  const auto body = ParseJson(answer.body);
  if (body.ok() && body->is_object() && body->contains("data") && (*body)["data"].is_array() &&
      !(*body)["data"].empty()) {
    const auto id = GetString((*body)["data"][0], "id");
    if (id.ok() && id->has_value()) return **id;
  }
  return Unavailable("{}/v1/models names no model: give --model", target.address.ToString());
}

}  // namespace

StatusOr<std::unique_ptr<Asker>> Asker::Create(net::io_context& io, const LoadTarget& target) {
  return target.grpc ? GrpcAsker::Create(io, target) : HttpAsker::Create(io, target);
}

StatusOr<LoadTarget> ParseTarget(const std::string& url) {
  const size_t separator = url.find("://");
  const std::string scheme = url.substr(0, std::min(separator, url.size()));
  LoadTarget target;
  target.tls = scheme == "https" || scheme == "grpcs";
  target.grpc = scheme == "grpc" || scheme == "grpcs";
  if (!target.tls && !target.grpc && scheme != "http") {
    return InvalidArgument("--url '{}': must begin with http://, https://, grpc:// or grpcs://", url);
  }
  const std::string rest = separator == std::string::npos ? "" : url.substr(separator + 3);
  const size_t slash = rest.find('/');
  MR_ASSIGN_OR_RETURN(target.address,
                      ParseHostPort(rest.substr(0, slash), "127.0.0.1", target.tls ? 443 : 80));
  if (slash != std::string::npos) target.path_prefix = rest.substr(slash);
  while (target.path_prefix.ends_with('/')) target.path_prefix.pop_back();
  if (target.grpc && !target.path_prefix.empty()) {
    return InvalidArgument("--url '{}': gRPC has no path", url);
  }
  return target;
}

StatusOr<Calibration> Calibrate(LoadTarget* target) {
  if (target->model.empty() && !target->grpc) {
    MR_ASSIGN_OR_RETURN(target->model, FirstModel(*target));
  }
  LoadOptions options;
  options.target = *target;
  options.target.stream = false;
  constexpr int32_t kShort = 40, kLong = 240;
  double tokens[2] = {0, 0};
  for (const int32_t words : {kShort, kLong}) {
    RequestResult result;
    const std::string body = RequestBody(options, {}, PromptText(7, words), 1);
    MR_ASSIGN_OR_RETURN(const Asker::Answer answer, AskOnce(options.target, PathOf(*target), body, &result));
    if (target->model.empty()) target->model = answer.model;
    tokens[words == kLong] = result.prompt_tokens;
  }
  Calibration calibration;
  if (tokens[1] <= tokens[0]) return calibration;
  calibration.counted = true;
  calibration.tokens_per_word = (tokens[1] - tokens[0]) / (kLong - kShort);
  calibration.tokens_around = std::max(0.0, tokens[0] - kShort * calibration.tokens_per_word);
  return calibration;
}

PhaseTotals ReadPhases(const LoadTarget& target, const std::string& metrics_url) {
  LoadTarget from = target;
  std::string path = "/metrics";
  if (metrics_url.empty() && target.grpc) return {};
  if (!metrics_url.empty()) {
    const auto parsed = ParseTarget(metrics_url);
    if (!parsed.ok()) return {};
    from = *parsed;
    if (!from.path_prefix.empty()) path.clear();
  }
  RequestResult result;
  const auto answer = AskOnce(from, path, "", &result);
  return answer.ok() ? ParsePhases(answer->body) : PhaseTotals{};
}

StatusOr<LoadResult> RunLoad(const LoadOptions& options,
                             const std::function<void(const LoadProgress&)>& progress,
                             const std::function<bool()>& interrupted) {
  MR_ASSIGN_OR_RETURN(Workload workload, Workload::Create(options.workload));
  Load load(options, progress, interrupted);
  MR_ASSIGN_OR_RETURN(std::unique_ptr<Asker> asker, Asker::Create(load.io(), options.target));
  return load.Run(std::move(workload), std::move(asker));
}

}  // namespace millrace::server
