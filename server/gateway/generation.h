#pragma once
// One answer on its way: picks workers, follows the stream, and continues it on another worker when one is
// lost.

#include <grpcpp/grpcpp.h>

#include <boost/asio/any_io_executor.hpp>
#include <boost/asio/awaitable.hpp>
#include <boost/asio/steady_timer.hpp>
#include <deque>
#include <memory>
#include <string>
#include <variant>
#include <vector>

#include "base/clock.h"
#include "engine/core/engine.h"
#include "server/gateway/api_request.h"
#include "server/gateway/in_flight.h"
#include "server/router/membership.h"
#include "server/rpc/generate_client.h"

namespace millrace::server {

struct GenerationOptions {
  int32_t local_prefill_tokens_max = 0;  // prompts up to here do not use a prefill worker
  int32_t attempts_max = 3;              // decode workers tried for one request
};

// Confined to its executor (a strand): every method is called there; gRPC's threads only post to it. Tokens
// come out gap-free and once each, whichever worker made them.
class Generation : public std::enable_shared_from_this<Generation> {
 public:
  // `membership` and `in_flight` outlive the generation. `request` is copied.
  static std::shared_ptr<Generation> Start(boost::asio::any_io_executor executor, Membership& membership,
                                           InFlight& in_flight, const GenerationOptions& options,
                                           const ApiRequest& request, TimePoint deadline);

  struct Tick {};  // nothing came within the wait
  struct End {
    Status status;  // OK only after a token that carried a finish reason
  };
  using Event = std::variant<engine::TokenEvent, End, Tick>;
  // The next event, or Tick after `wait`. After End nothing more comes.
  boost::asio::awaitable<Event> Next(Duration wait);

  // Stops the work on every worker. Events end with End(`reason`). Idempotent.
  void Cancel(const Status& reason);

 private:
  class Observer;

  Generation(boost::asio::any_io_executor executor, Membership& membership, InFlight& in_flight,
             const GenerationOptions& options, const ApiRequest& request, TimePoint deadline);
  void Dispatch();
  void OnEvent(int32_t attempt, const rpc::GenerateEvent& event);
  void OnDone(int32_t attempt, const grpc::Status& status);
  void Finish(Status status);
  bool CanContinue(const grpc::Status& status) const;

  const InFlight::Presence
      presence_;  // first, so that it goes last: what follows needs the gateway's threads
  const boost::asio::any_io_executor executor_;
  Membership& membership_;
  InFlight& in_flight_;
  const GenerationOptions options_;
  const TimePoint deadline_;
  rpc::GenerateRequest request_;     // output grows with every token, so that another worker can continue
  std::vector<std::string> failed_;  // decode workers that failed this request
  int32_t attempt_ = 0;              // events of earlier attempts are stale
  std::shared_ptr<GenerateCall> call_;
  InFlight::Lease decode_lease_;
  InFlight::Lease prefill_lease_;  // until the first token of the attempt
  std::deque<Event> events_;
  bool finish_seen_ = false;  // a token with a finish reason came
  bool ended_ = false;        // End is queued or was taken
  boost::asio::steady_timer wake_;
};

}  // namespace millrace::server
