#pragma once
// One client connection: which route answers which request.

#include <boost/asio/awaitable.hpp>
#include <boost/beast/core/tcp_stream.hpp>
#include <memory>

#include "server/gateway/access.h"
#include "server/gateway/gateway_context.h"

namespace millrace::server {

// Serves the connection, which `listener` accepted, until it closes. Runs on the stream's strand.
boost::asio::awaitable<void> ServeConnection(boost::beast::tcp_stream stream, Listener listener,
                                             std::shared_ptr<GatewayContext> context);

}  // namespace millrace::server
