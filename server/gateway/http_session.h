#pragma once
// One client connection: reads requests, answers them, notices when the client goes.

#include <atomic>
#include <boost/asio/awaitable.hpp>
#include <boost/beast/core/tcp_stream.hpp>
#include <boost/beast/http/message.hpp>
#include <boost/beast/http/string_body.hpp>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <string>

#include "server/gateway/gateway.h"

namespace millrace::server {

// How to end the connections that there are.
class SessionStops {
 public:
  // Thread-safe, as all here. `stop` is called from StopAll, under a lock: it only posts.
  uint64_t Add(std::function<void()> stop);
  void Remove(uint64_t id);
  void StopAll();

 private:
  std::mutex mutex_;
  std::map<uint64_t, std::function<void()>> stops_;
  uint64_t next_id_ = 0;
};

// What every session of one gateway shares. Read-only but for what is thread-safe; outlives the sessions.
struct GatewayContext {
  const GatewayOptions& options;
  const ModelInfo& model;
  const engine::Tokenizer& tokenizer;
  Membership& membership;
  Metrics& metrics;
  InFlight in_flight{};
  std::atomic<bool> draining{false};
  SessionStops stops{};
  std::atomic<int32_t> connections{0};
  std::atomic<int32_t> requests_running{0};
};

// Serves the connection until it closes. Runs on the stream's strand.
boost::asio::awaitable<void> ServeConnection(boost::beast::tcp_stream stream,
                                             std::shared_ptr<GatewayContext> context);

}  // namespace millrace::server
