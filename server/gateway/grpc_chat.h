#pragma once
// millrace.v1.Chat: the gateway's API over gRPC, with health and reflection.

#include <boost/asio/io_context.hpp>
#include <memory>
#include <string>

#include "server/gateway/gateway_context.h"

namespace millrace::server {

// Thread-safe. gRPC's threads only post; every call lives on a strand of the gateway's threads.
class GrpcChat {
 public:
  // Listens on options.grpc_listen, under the gateway's certificate if it has one (read again when it
  // changes). `io` and its threads outlive what is returned. Unavailable when the address cannot be bound.
  static StatusOr<std::unique_ptr<GrpcChat>> Start(std::shared_ptr<GatewayContext> context,
                                                   boost::asio::io_context& io);
  virtual ~GrpcChat() = default;            // Shutdown if not done
  virtual std::string address() const = 0;  // "host:port" as bound
  // Refuses new calls at once, cuts those that run after a moment. Returns when all are gone.
  virtual void Shutdown() = 0;
};

}  // namespace millrace::server
