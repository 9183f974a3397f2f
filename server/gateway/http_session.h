#pragma once
// One client connection: reads requests, answers them, notices when the client goes.

#include <atomic>
#include <boost/asio/awaitable.hpp>
#include <boost/beast/core/tcp_stream.hpp>
#include <boost/beast/http/message.hpp>
#include <boost/beast/http/string_body.hpp>
#include <memory>
#include <string>

#include "server/gateway/gateway.h"

namespace millrace::server {

// What every session of one gateway shares. Read-only but for what is thread-safe; outlives the sessions.
struct GatewayContext {
  const GatewayOptions& options;
  const ModelInfo& model;
  const engine::Tokenizer& tokenizer;
  Membership& membership;
  Metrics& metrics;
  InFlight in_flight{};
  std::atomic<bool> draining{false};
  std::atomic<int32_t> connections{0};
  std::atomic<int32_t> requests_running{0};
};

// Serves the connection until it closes. Runs on the stream's strand.
boost::asio::awaitable<void> ServeConnection(boost::beast::tcp_stream stream,
                                             std::shared_ptr<GatewayContext> context);

}  // namespace millrace::server
