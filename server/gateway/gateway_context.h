#pragma once
// What every connection of one gateway shares.

#include <atomic>
#include <functional>
#include <map>
#include <mutex>
#include <set>
#include <string>

#include "server/gateway/answer.h"
#include "server/gateway/api_keys.h"
#include "server/gateway/gateway.h"
#include "server/gateway/in_flight.h"
#include "server/gateway/request_metrics.h"

namespace millrace::server {

// How to end what runs: connections, or answers by their name.
class Stops {
 public:
  // Thread-safe, as all here. `stop` is called under a lock: it only posts.
  uint64_t Add(std::function<void()> stop, const std::string& name = "");
  void Remove(uint64_t id);
  void StopAll();
  // True when one of that name was there.
  bool Stop(const std::string& name);

 private:
  struct Entry {
    std::function<void()> stop;
    std::string name;
  };
  std::mutex mutex_;
  std::map<uint64_t, Entry> stops_;
  uint64_t next_id_ = 0;
};

// Says once per name that a field of requests is not known. Thread-safe; bounded.
class UnknownFields {
 public:
  void Note(const std::vector<std::string>& fields);

 private:
  std::mutex mutex_;
  std::set<std::string> seen_;
};

// Read-only but for what is thread-safe; outlives the sessions.
struct GatewayContext {
  const GatewayOptions& options;
  const ModelInfo& model;
  const engine::Tokenizer& tokenizer;
  Membership& membership;
  Metrics& metrics;
  Admission admission;
  std::unique_ptr<ApiKeys> keys{};    // null: everybody may ask
  std::unique_ptr<TlsContext> tls{};  // null: no TLS
  InFlight in_flight{};
  RequestLog request_log{};
  RequestMetrics request_metrics{metrics};
  std::atomic<bool> draining{false};
  Stops connections_stops{};
  Stops answer_stops{};
  UnknownFields unknown_fields{};
  std::atomic<int32_t> connections{0};
  std::atomic<int32_t> requests_running{0};

  // What a failed request is told: FromStatus, and when to come back if it was too much.
  ApiError FailureOf(const Status& status) const;
  // When a request that comes now has to be answered: as it wishes, within this gateway's limit.
  TimePoint DeadlineOf(const ApiRequest& request) const;
  // Adds to answer_stops: cancels `answer`, which lives on `executor`. Whoever adds it removes it.
  uint64_t AddAnswerStop(const boost::asio::any_io_executor& executor, const std::shared_ptr<Answer>& answer,
                         const std::string& id);
  AnswerContext ForAnswers() {
    return {tokenizer,       membership,         in_flight,       admission, request_log,
            request_metrics, options.generation, options.tracing, model.name};
  }
};

}  // namespace millrace::server
