#pragma once
// One choice on its way: picks workers, follows the stream, and continues it on another worker when one is
// lost.

#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <variant>
#include <vector>

#include "base/clock.h"
#include "engine/core/engine.h"
#include "server/gateway/in_flight.h"
#include "server/gateway/request_log.h"
#include "server/router/membership.h"
#include "server/rpc/generate_client.h"
#include "server/rpc/task_runner.h"
#include "server/trace/span.h"

namespace millrace::server {

struct GenerationOptions {
  int32_t local_prefill_tokens_max = 0;  // prompts up to here do not use a prefill worker
  int32_t attempts_max = 4;              // decode workers tried in a row without a token of the answer
  // How long an answer whose worker was lost waits for one to go on with, when there is none.
  Duration failover_patience = std::chrono::seconds(10);
};

struct GenerationRequest {
  std::string id;               // for logs and traces
  std::vector<int32_t> prompt;  // token ids
  engine::SamplingParams sampling;
  int32_t priority = 0;
  std::string cache_salt;  // KV is shared only among requests of one salt
  TimePoint deadline = kNoDeadline;
  SpanSink* spans = nullptr;  // may be null; outlives the generation
  TraceContext trace;         // what asks for it
};

// Confined to its runner (a strand): every method is called there; gRPC's threads only post to it. Tokens
// come out gap-free and once each, whichever worker made them.
class Generation : public std::enable_shared_from_this<Generation> {
 public:
  struct End {
    Status status;  // OK only after a token that carried a finish reason
  };
  using Event = std::variant<engine::TokenEvent, PhaseTimes, End>;

  // `membership` and `in_flight` outlive the generation; the runner is shared with others of one strand.
  // `on_event` is called on it; nothing comes after End.
  static std::shared_ptr<Generation> Create(std::shared_ptr<TaskRunner> runner, Membership& membership,
                                            InFlight& in_flight, const GenerationOptions& options,
                                            const GenerationRequest& request,
                                            std::function<void(const Event&)> on_event);
  // Once. May end the generation at once.
  void Start() { Dispatch(); }

  // Stops the work on every worker. Nothing comes any more but End(`reason`). Idempotent.
  void Cancel(const Status& reason);

 private:
  class Observer;

  Generation(std::shared_ptr<TaskRunner> runner, Membership& membership, InFlight& in_flight,
             const GenerationOptions& options, const GenerationRequest& request,
             std::function<void(const Event&)> on_event);
  void Dispatch();
  void NobodyServes(const Status& why);
  void Watch();
  void LookAfterWorker();
  void Lost(const Status& cause);
  void Retry(Duration wait);
  void SetTimer(Duration wait, void (Generation::*then)());
  void OnEvent(int32_t attempt, const rpc::GenerateEvent& event);
  void OnDone(int32_t attempt, const grpc::Status& status);
  void Finish(Status status);
  bool CanContinue(const Status& status) const;

  const InFlight::Presence
      presence_;  // first, so that it goes last: what follows needs the gateway's threads
  const std::shared_ptr<TaskRunner> runner_;
  Membership& membership_;
  InFlight& in_flight_;
  const GenerationOptions options_;
  const TimePoint deadline_;
  rpc::GenerateRequest request_;  // output grows with every token, so that another worker can continue
  std::string decode_;            // of the attempt
  uint64_t decode_epoch_ = 0;
  std::vector<std::string> failed_;           // decode workers that failed this request since its last token
  int32_t attempt_ = 0;                       // events of earlier attempts are stale
  int32_t fruitless_ = 0;                     // attempts since the last token
  Status cause_;                              // why the last attempt failed
  TimePoint waiting_since_{};                 // since when there is no worker to go on with; 0 = there is
  TimePoint heard_{};                         // from the worker of the attempt
  std::optional<TaskRunner::TimerId> timer_;  // looks after the worker, or waits for the next attempt
  std::shared_ptr<GenerateCall> call_;
  InFlight::Lease decode_lease_;
  InFlight::Lease prefill_lease_;  // until the first token of the attempt
  SpanSink* const spans_;
  const TraceContext trace_;
  Span span_;  // of the attempt
  const std::function<void(const Event&)> on_event_;
  bool ended_ = false;  // End was said
};

}  // namespace millrace::server
