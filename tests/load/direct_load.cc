// direct_load: the streams of stream_load read from the null_workers themselves, over gRPC as a gateway reads
// them: what tokens are older through a gateway is the gateway's share, and its clients'.
//
//   direct_load --tokens-file FILE --streams 1000
//
// Prints one JSON object; exit 1 when a call failed.
#include <CLI/CLI.hpp>
#include <algorithm>
#include <atomic>
#include <mutex>
#include <thread>
#include <vector>

#include "base/file.h"
#include "base/json.h"
#include "server/rpc/channel.h"
#include "server/rpc/convert.h"
#include "server/rpc/generate_client.h"

namespace millrace::server {
namespace {

constexpr auto kLook = std::chrono::milliseconds(20);

struct Options {
  std::string tokens_file;
  int streams = 1000;
  int tokens = 60;
};

// Shared by all streams. Thread-safe.
class Ages {
 public:
  Ages(Duration tick, int64_t every) : tick_(tick), every_(every) {}

  // From a worker whose steps end at ticks that are `phase` modulo `every`, the last one less than a step
  // ago.
  void OnToken(int32_t index, int64_t phase) {
    const Duration now = std::chrono::steady_clock::now().time_since_epoch();
    if (index == 0) ++begun_;
    if (!measuring_) return;
    const std::lock_guard lock(mutex_);
    ms_.push_back(1e3 * Seconds((now - tick_ * phase) % (tick_ * every_)));
  }
  void OnDone(const grpc::Status& status) {
    if (!status.ok()) ++failed_;
    ++done_;
  }
  int begun() const { return begun_; }
  int done() const { return done_; }
  int failed() const { return failed_; }
  void Measure(bool on) { measuring_ = on; }
  std::vector<double> Sorted() {
    const std::lock_guard lock(mutex_);
    std::sort(ms_.begin(), ms_.end());
    return ms_;
  }

 private:
  const Duration tick_;
  const int64_t every_;
  std::atomic<int> begun_ = 0;
  std::atomic<int> done_ = 0;
  std::atomic<int> failed_ = 0;
  std::atomic<bool> measuring_ = false;
  std::mutex mutex_;
  std::vector<double> ms_;
};

class Observer final : public GenerateObserver {
 public:
  Observer(Ages& ages, int64_t phase) : ages_(ages), phase_(phase) {}
  void OnEvent(const rpc::GenerateEvent& event) override {
    if (event.has_token()) ages_.OnToken(event.token().index(), phase_);
  }
  void OnDone(const grpc::Status& status) override { ages_.OnDone(status); }

 private:
  Ages& ages_;
  const int64_t phase_;
};

rpc::GenerateRequest Request(int number, int tokens) {
  engine::SamplingParams sampling;
  sampling.temperature = 0;
  sampling.ignore_eos = true;
  sampling.max_tokens = tokens;
  rpc::GenerateRequest request;
  request.set_protocol_version(kProtocolVersion);
  request.set_request_id(fmt::format("direct-{}", number));
  request.set_model_digest("null");
  for (const int32_t token : {5, 6, 7, 8}) request.add_prompt(token);
  SamplingToProto(sampling, request.mutable_sampling());
  return request;
}

Status Run(const Options& options) {
  MR_ASSIGN_OR_RETURN(const std::string text, ReadFile(options.tokens_file));
  MR_ASSIGN_OR_RETURN(const Json said, ParseJson(text));
  const auto tick = std::chrono::duration_cast<Duration>(
      std::chrono::duration<double, std::milli>(said["tick_ms"].get<double>()));
  const auto addresses = said["addresses"].get<std::vector<std::string>>();
  const auto every = said["every"].get<int64_t>();
  Ages ages(tick, every);
  ChannelPool channels(grpc::InsecureChannelCredentials());
  std::vector<std::shared_ptr<GenerateCall>> calls;
  for (int i = 0; i < options.streams; ++i) {
    const int64_t worker = i % static_cast<int64_t>(addresses.size());  // its number is its phase
    calls.push_back(StartGenerate(channels.Get(addresses[static_cast<size_t>(worker)]),
                                  Request(i, options.tokens), std::chrono::system_clock::time_point::max(),
                                  std::make_shared<Observer>(ages, worker)));
  }
  while (ages.begun() < options.streams && ages.done() == 0) std::this_thread::sleep_for(kLook);
  // A few tokens of every stream at the beginning and at the end are not counted.
  const auto step = std::chrono::duration<double>(Seconds(tick * every));
  std::this_thread::sleep_for(3 * step);
  ages.Measure(true);
  std::this_thread::sleep_for(std::max(options.tokens - 10, 1) * step);
  ages.Measure(false);
  while (ages.done() < options.streams) std::this_thread::sleep_for(kLook);
  if (ages.failed() > 0) return Unavailable("{} of {} calls failed", ages.failed(), options.streams);
  const std::vector<double> sorted = ages.Sorted();
  if (sorted.empty()) return Unavailable("no token was measured");
  const auto quantile = [&](double q) {
    return sorted[static_cast<size_t>(q * static_cast<double>(sorted.size() - 1))];
  };
  fmt::print(
      "{}\n",
      DumpJson(Json{{"streams", options.streams},
                    {"tokens", sorted.size()},
                    {"age_ms", {{"p50", quantile(0.5)}, {"p99", quantile(0.99)}, {"max", quantile(1)}}}}));
  return OkStatus();
}

}  // namespace
}  // namespace millrace::server

int main(int argc, char** argv) {
  millrace::server::Options options;
  CLI::App app("Streams read from null_workers without a gateway");
  app.add_option("--tokens-file", options.tokens_file, "What null_worker printed")->required();
  app.add_option("--streams", options.streams, "How many")
      ->check(CLI::Range(1, 20000))
      ->capture_default_str();
  app.add_option("--tokens", options.tokens, "Of each")->check(CLI::Range(20, 2000))->capture_default_str();
  CLI11_PARSE(app, argc, argv);
  const millrace::Status status = millrace::server::Run(options);
  if (!status.ok()) fmt::print(stderr, "direct_load: {}\n", millrace::Message(status));
  return status.ok() ? 0 : 1;
}
