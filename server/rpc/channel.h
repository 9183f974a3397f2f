#pragma once
// How this program's gRPC channels and servers are set up: a cut link is noticed in seconds, long prompts
// fit.

#include <grpcpp/grpcpp.h>

#include <map>
#include <memory>
#include <mutex>
#include <string>

#include "base/clock.h"
#include "base/status.h"

namespace millrace::server {

inline constexpr int kMessageBytesMax = 64 << 20;

grpc::ChannelArguments ChannelArguments();
// Keepalive, message size, and a port in use is an error.
void ConfigureServer(grpc::ServerBuilder* builder);

// Starts `builder` listening on `listen` ("host:port", port 0 = any). *address gets "host:port" as bound.
// Unavailable with the system's reason when the address cannot be bound.
StatusOr<std::unique_ptr<grpc::Server>> StartServer(grpc::ServerBuilder* builder, const std::string& listen,
                                                    std::shared_ptr<grpc::ServerCredentials> credentials,
                                                    std::string* address);

grpc::Status ToGrpc(const Status& status);
Status FromGrpc(const grpc::Status& status);
// gRPC's deadline for a steady one: time_point::max() when there is none.
std::chrono::system_clock::time_point GrpcDeadline(TimePoint deadline);

// One shared channel per address. Thread-safe.
class ChannelPool {
 public:
  explicit ChannelPool(std::shared_ptr<grpc::ChannelCredentials> credentials);
  std::shared_ptr<grpc::Channel> Get(const std::string& address);
  void Forget(const std::string& address);  // running calls keep theirs

 private:
  const std::shared_ptr<grpc::ChannelCredentials> credentials_;
  std::mutex mutex_;
  std::map<std::string, std::shared_ptr<grpc::Channel>> channels_;
};

}  // namespace millrace::server
