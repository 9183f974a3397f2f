// stream_load: many streamed completions at once against a gateway whose workers are null_workers.
//
//   stream_load --address 127.0.0.1:8000 --tokens-file FILE --streams 1000 --slow 200
//
// A token says at which tick of the steady clock it was there (null_backend.h), so its age on arrival is what
// everything between the engine and this reader added. Slow readers take --slow-rate bytes a second from
// small socket buffers; when the others have finished, half of them leave in the middle of their answers and
// half read theirs to the end. One thread. Prints one JSON object; exit 1 when an answer was broken,
// incomplete or out of order.
#include <arpa/inet.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <unistd.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <fstream>
#include <map>
#include <unordered_map>

#include "base/clock.h"
#include "base/file.h"
#include "base/json.h"
#include "base/net.h"
#include "tests/load/stream_reader.h"

namespace millrace {
namespace {

struct Options {
  std::string address;
  std::string tokens_file;
  int streams = 1000;
  int slow = 0;
  int tokens = 100;
  int slow_rate = 1000;
  double patience = 120;
  std::vector<std::string> processes;  // NAME=PID
};

constexpr size_t kReadBytes = 64 << 10;
constexpr int kSlowBuffer = 4 << 10;
constexpr auto kSlowEvery = std::chrono::milliseconds(100);
constexpr int kSettledTokens = 3;  // of every stream, before the measured time begins
// Requests under way at the start: the rest of the load is not to be refused by a full queue of connections.
constexpr int kOpenAtOnce = 100;

TimePoint Now() { return std::chrono::steady_clock::now(); }

struct Usage {
  double cpu_seconds = 0;
  double rss_bytes = 0;
};

Usage UsageOf(const std::string& pid) {
  Usage usage;
  std::ifstream stat("/proc/" + pid + "/stat");
  const std::string text{std::istreambuf_iterator<char>(stat), {}};
  std::istringstream fields(text.substr(std::min(text.rfind(')') + 1, text.size())));
  std::string skip;
  for (int i = 0; i < 11; ++i) fields >> skip;
  double user = 0, system = 0;
  fields >> user >> system;
  usage.cpu_seconds = (user + system) / static_cast<double>(sysconf(_SC_CLK_TCK));
  std::ifstream statm("/proc/" + pid + "/statm");
  double size = 0, resident = 0;
  statm >> size >> resident;
  usage.rss_bytes = resident * static_cast<double>(sysconf(_SC_PAGESIZE));
  return usage;
}

// Memory of all TCP sockets of this network namespace.
double SocketBytes() {
  std::ifstream file("/proc/net/sockstat");
  for (std::string line; std::getline(file, line);) {
    if (const size_t found = line.find(" mem "); line.starts_with("TCP:") && found != std::string::npos)
      return std::stod(line.substr(found + 5)) * static_cast<double>(sysconf(_SC_PAGESIZE));
  }
  return 0;
}

struct Stream {
  UniqueFd fd;
  StreamReader reader;
  bool slow = false;
  int tokens = 0;
  int64_t last_tick = 0;
  bool ended = false;
};

class Load {
 public:
  // `tick`, `every` and `tokens` as null_worker says them.
  Load(const Options& options, Duration tick, int64_t every, std::vector<std::string> tokens)
      : options_(options),
        tick_(tick),
        every_(every),
        num_ticks_(static_cast<int64_t>(tokens.size())),
        buffer_(kReadBytes),
        epoll_(epoll_create1(EPOLL_CLOEXEC)) {
    for (size_t i = 0; i < tokens.size(); ++i) ticks_[std::move(tokens[i])] = static_cast<int64_t>(i);
    for (const std::string& process : options.processes) {
      const size_t equals = process.find('=');
      pids_[process.substr(0, equals)] = process.substr(equals + 1);
    }
  }

  Status Run() {
    MR_ASSIGN_OR_RETURN(const HostPort address, ParseHostPort(options_.address));
    deadline_ =
        Now() + std::chrono::duration_cast<Duration>(std::chrono::duration<double>(options_.patience));
    before_ = Look();
    socket_bytes_before_ = SocketBytes();
    streams_.resize(static_cast<size_t>(options_.streams + options_.slow));
    for (size_t i = 0; i < streams_.size(); ++i) {
      streams_[i].slow = i >= static_cast<size_t>(options_.streams);
      MR_RETURN_IF_ERROR(Connect(address, i));
    }
    connected_ = Look();
    size_t asked = 0;
    next_slow_read_ = Now();
    while (num_ended_ < options_.streams) {
      while (asked < streams_.size() && asked < num_answered_ + kOpenAtOnce)
        MR_RETURN_IF_ERROR(Ask(&streams_[asked++]));
      MR_RETURN_IF_ERROR(Turn());
      if (!measuring_ && !measured_ && num_settled_ == options_.streams) BeginMeasuring();
      if (measuring_ && num_ended_ > 0) EndMeasuring();
    }
    MR_RETURN_IF_ERROR(EndSlowOnes());
    ended_ = Look();
    return OkStatus();
  }

  Json Report() {
    std::sort(ages_ms_.begin(), ages_ms_.end());
    const auto quantile = [&](double q) -> Json {
      if (ages_ms_.empty()) return nullptr;
      return ages_ms_[static_cast<size_t>(q * static_cast<double>(ages_ms_.size() - 1))];
    };
    // Every stream draws one token a tick, read or not.
    const double tokens =
        static_cast<double>(ages_ms_.size()) * static_cast<double>(streams_.size()) / options_.streams;
    Json processes = Json::object();
    for (const auto& [name, pid] : pids_) {
      const double cpu = to_[name].cpu_seconds - from_[name].cpu_seconds;
      processes[name] = {
          {"cpu_us_per_token", 1e6 * cpu / tokens}, {"cores", cpu / Seconds(measured_to_ - measured_from_)},
          {"rss_before", before_[name].rss_bytes},  {"rss_connected", connected_[name].rss_bytes},
          {"rss_streaming", to_[name].rss_bytes},   {"rss_after", ended_[name].rss_bytes}};
    }
    return {{"streams", options_.streams},
            {"slow", options_.slow},
            {"step_ms", 1e3 * Seconds(tick_ * every_)},
            {"workers", every_},
            {"measured_seconds", Seconds(measured_to_ - measured_from_)},
            {"measured_tokens", tokens},
            {"steps_missed", steps_missed_},
            {"age_ms",
             {{"p50", quantile(0.5)},
              {"p90", quantile(0.9)},
              {"p99", quantile(0.99)},
              {"p999", quantile(0.999)},
              {"max", quantile(1)}}},
            {"socket_bytes", socket_bytes_ - socket_bytes_before_},
            {"processes", processes},
            {"slow_left", num_left_},
            {"slow_finished", num_slow_finished_}};
  }

 private:
  using Looked = std::map<std::string, Usage>;
  Looked Look() const {
    Looked looked;
    for (const auto& [name, pid] : pids_) looked[name] = UsageOf(pid);
    return looked;
  }

  Status Connect(const HostPort& address, size_t index) {
    Stream& stream = streams_[index];
    stream.fd = UniqueFd(socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0));
    if (!stream.fd.valid()) return Internal("socket: {}", strerror(errno));
    if (stream.slow) setsockopt(stream.fd.get(), SOL_SOCKET, SO_RCVBUF, &kSlowBuffer, sizeof kSlowBuffer);
    sockaddr_in to{};
    to.sin_family = AF_INET;
    to.sin_port = htons(address.port);
    inet_pton(AF_INET, address.host.c_str(), &to.sin_addr);
    if (connect(stream.fd.get(), reinterpret_cast<const sockaddr*>(&to), sizeof to) != 0)
      return Unavailable("connect {}: {}", options_.address, strerror(errno));
    fcntl(stream.fd.get(), F_SETFL, O_NONBLOCK);
    epoll_event event{};
    event.events = EPOLLIN;
    event.data.u64 = index;
    if (!stream.slow) epoll_ctl(epoll_.get(), EPOLL_CTL_ADD, stream.fd.get(), &event);
    return OkStatus();
  }

  Status Ask(Stream* stream) const {
    const std::string body = DumpJson(Json{{"prompt", "Once upon a time"},
                                           {"max_tokens", options_.tokens},
                                           {"ignore_eos", true},
                                           {"stream", true},
                                           {"temperature", 0}});
    const std::string request = fmt::format(
        "POST /v1/completions HTTP/1.1\r\nhost: {}\r\ncontent-type: application/json\r\ncontent-length: "
        "{}\r\n\r\n{}",
        options_.address, body.size(), body);
    if (send(stream->fd.get(), request.data(), request.size(), MSG_NOSIGNAL) !=
        static_cast<ssize_t>(request.size()))
      return Unavailable("send: {}", strerror(errno));
    return OkStatus();
  }

  Status Turn() {
    epoll_event events[256];
    const int count = epoll_wait(epoll_.get(), events, std::size(events), 20);
    for (int i = 0; i < count; ++i) MR_RETURN_IF_ERROR(Read(&streams_[events[i].data.u64], kReadBytes));
    if (Now() > deadline_)
      return DeadlineExceeded("{} of {} streams settled, {} ended within {} s", num_settled_,
                              options_.streams, num_ended_, options_.patience);
    if (Now() < next_slow_read_) return OkStatus();
    next_slow_read_ += kSlowEvery;
    for (Stream& stream : streams_) {
      if (stream.slow && !stream.ended)
        MR_RETURN_IF_ERROR(Read(&stream, static_cast<size_t>(options_.slow_rate) / 10));
    }
    return OkStatus();
  }

  // At most `bytes_max`, until the socket has no more.
  Status Read(Stream* stream, size_t bytes_max) {
    while (bytes_max > 0 && !stream->ended) {
      const ssize_t got = recv(stream->fd.get(), buffer_.data(), std::min(bytes_max, buffer_.size()), 0);
      if (got < 0 && errno == EAGAIN) return OkStatus();
      if (got <= 0)
        return DataLoss("a stream broke off after {} tokens: {}", stream->tokens,
                        got == 0 ? "end of stream" : strerror(errno));
      bytes_max -= static_cast<size_t>(got);
      const TimePoint now = Now();
      Status status;
      const bool was_answered = stream->reader.status() != 0;
      stream->reader.Push({buffer_.data(), static_cast<size_t>(got)}, [&](std::string_view text) {
        if (status.ok()) status = OnToken(stream, text, now);
      });
      num_answered_ += !was_answered && stream->reader.status() != 0;
      MR_RETURN_IF_ERROR(status);
      if (!stream->reader.error().empty()) return DataLoss("a stream failed: {}", stream->reader.error());
      if (stream->reader.done()) MR_RETURN_IF_ERROR(OnEnd(stream));
      if (static_cast<size_t>(got) < std::min(kReadBytes, buffer_.size())) return OkStatus();
    }
    return OkStatus();
  }

  Status OnToken(Stream* stream, std::string_view text, TimePoint now) {
    const auto found = ticks_.find(std::string(text));
    if (found == ticks_.end()) return DataLoss("'{}' is no token of the worker", text);
    ++stream->tokens;
    if (stream->tokens > 1) {
      const int64_t steps = ((found->second - stream->last_tick) % num_ticks_ + num_ticks_) % num_ticks_;
      if (steps == 0 || steps % every_ != 0 || steps > num_ticks_ / 2)
        return DataLoss("token {} of a stream came out of order", stream->tokens);
      if (measuring_ && !stream->slow) steps_missed_ += static_cast<uint64_t>(steps / every_ - 1);
    }
    stream->last_tick = found->second;
    if (stream->slow) return OkStatus();
    num_settled_ += stream->tokens == kSettledTokens;
    if (!measuring_) return OkStatus();
    const int64_t tick_now = now.time_since_epoch() / tick_;
    const int64_t tick = tick_now - ((tick_now - found->second) % num_ticks_ + num_ticks_) % num_ticks_;
    ages_ms_.push_back(1e3 * Seconds(now.time_since_epoch() - tick_ * tick));
    return OkStatus();
  }

  Status OnEnd(Stream* stream) {
    stream->ended = true;
    stream->fd.Reset();
    num_ended_ += !stream->slow;
    num_slow_finished_ += stream->slow;
    if (stream->tokens != options_.tokens)
      return DataLoss("an answer has {} tokens instead of {}", stream->tokens, options_.tokens);
    return OkStatus();
  }

  void BeginMeasuring() {
    measuring_ = true;
    measured_from_ = Now();
    from_ = Look();
  }
  void EndMeasuring() {
    measuring_ = false;
    measured_ = true;
    measured_to_ = Now();
    to_ = Look();
    socket_bytes_ = SocketBytes();
  }

  Status EndSlowOnes() {
    bool leave = false;
    for (Stream& stream : streams_) {
      if (stream.ended) continue;
      leave = !leave;
      if (!leave) continue;
      stream.ended = true;
      stream.fd.Reset();
      ++num_left_;
    }
    for (Stream& stream : streams_) {
      if (!stream.ended) fcntl(stream.fd.get(), F_SETFL, 0);
      while (!stream.ended) MR_RETURN_IF_ERROR(Read(&stream, SIZE_MAX));
    }
    return OkStatus();
  }

  const Options options_;
  const Duration tick_;
  const int64_t every_;
  const int64_t num_ticks_;
  std::unordered_map<std::string, int64_t> ticks_;
  std::map<std::string, std::string> pids_;
  std::vector<Stream> streams_;
  std::vector<char> buffer_;
  const UniqueFd epoll_;
  TimePoint deadline_, next_slow_read_, measured_from_, measured_to_;
  Looked before_, connected_, from_, to_, ended_;
  double socket_bytes_before_ = 0, socket_bytes_ = 0;
  std::vector<double> ages_ms_;
  uint64_t steps_missed_ = 0;
  size_t num_answered_ = 0;
  int num_settled_ = 0, num_ended_ = 0, num_left_ = 0, num_slow_finished_ = 0;
  bool measuring_ = false, measured_ = false;
};

Status Run(const Options& options) {
  MR_ASSIGN_OR_RETURN(const std::string text, ReadFile(options.tokens_file));
  MR_ASSIGN_OR_RETURN(const Json said, ParseJson(text));
  const std::chrono::duration<double, std::milli> tick(said.at("tick_ms").get<double>());
  Load load(options, std::chrono::duration_cast<Duration>(tick), said.at("every").get<int64_t>(),
            said.at("tokens").get<std::vector<std::string>>());
  MR_RETURN_IF_ERROR(load.Run());
  fmt::print("{}\n", DumpJson(load.Report()));
  return OkStatus();
}

}  // namespace
}  // namespace millrace

int main(int argc, char** argv) {
  millrace::Options options;
  CLI::App app("Many streamed completions at once");
  app.add_option("--address", options.address, "host:port of the gateway")->required();
  app.add_option("--tokens-file", options.tokens_file, "What null_worker printed")->required();
  app.add_option("--streams", options.streams, "Readers that keep up")
      ->check(CLI::PositiveNumber)
      ->capture_default_str();
  app.add_option("--slow", options.slow, "Readers that do not")->capture_default_str();
  app.add_option("--slow-rate", options.slow_rate, "Bytes a second of each of these")
      ->check(CLI::Range(10, 1 << 20))
      ->capture_default_str();
  app.add_option("--tokens", options.tokens, "Of each answer")
      ->check(CLI::PositiveNumber)
      ->capture_default_str();
  app.add_option("--patience", options.patience, "Seconds for all of it")->capture_default_str();
  app.add_option("--process", options.processes, "NAME=PID whose CPU time and memory are told, repeatable");
  CLI11_PARSE(app, argc, argv);
  const millrace::Status status = millrace::Run(options);
  if (!status.ok()) fmt::print(stderr, "stream_load: {}\n", millrace::Message(status));
  return status.ok() ? 0 : 1;
}
