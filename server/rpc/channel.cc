#include "server/rpc/channel.h"

#include <netdb.h>
#include <sys/socket.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>

#include "base/net.h"

namespace millrace::server {
namespace {

constexpr int kKeepaliveMs = 2000;
constexpr int kKeepaliveTimeoutMs = 2000;
// More addresses than any cluster of ours has; past it idle channels are dropped, running calls keep theirs.
constexpr size_t kChannelsMax = 4096;

// Why `where` cannot be bound, in the system's words; gRPC says only that it cannot.
std::string BindError(const HostPort& where) {
  addrinfo hints{};
  hints.ai_socktype = SOCK_STREAM;
  hints.ai_flags = AI_PASSIVE;
  addrinfo* found = nullptr;
  const std::string port = std::to_string(where.port);
  if (const int error = getaddrinfo(where.host.c_str(), port.c_str(), &hints, &found); error != 0) {
    return gai_strerror(error);
  }
  int bind_errno = 0;
  const int fd = socket(found->ai_family, SOCK_STREAM, 0);
  if (fd >= 0) {
    const int on = 1;
    setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &on, sizeof(on));
    if (bind(fd, found->ai_addr, found->ai_addrlen) != 0) bind_errno = errno;
    close(fd);
  }
  freeaddrinfo(found);
  return bind_errno == EADDRINUSE ? "address already in use"
         : bind_errno != 0        ? std::strerror(bind_errno)
                                  : "cannot be bound";
}

}  // namespace

grpc::ChannelArguments ChannelArguments() {
  grpc::ChannelArguments arguments;
  arguments.SetMaxReceiveMessageSize(kMessageBytesMax);
  arguments.SetMaxSendMessageSize(kMessageBytesMax);
  arguments.SetInt(GRPC_ARG_KEEPALIVE_TIME_MS, kKeepaliveMs);
  arguments.SetInt(GRPC_ARG_KEEPALIVE_TIMEOUT_MS, kKeepaliveTimeoutMs);
  arguments.SetInt(GRPC_ARG_HTTP2_MAX_PINGS_WITHOUT_DATA, 0);  // no limit
  arguments.SetInt(GRPC_ARG_INITIAL_RECONNECT_BACKOFF_MS, 100);
  arguments.SetInt(GRPC_ARG_MIN_RECONNECT_BACKOFF_MS, 1000);
  arguments.SetInt(GRPC_ARG_MAX_RECONNECT_BACKOFF_MS, 1000);
  arguments.SetInt(GRPC_ARG_ENABLE_RETRIES, 0);  // who retries, and with what, is decided above
  return arguments;
}

void ConfigureServer(grpc::ServerBuilder* builder) {
  builder->SetMaxReceiveMessageSize(kMessageBytesMax);
  builder->SetMaxSendMessageSize(kMessageBytesMax);
  builder->AddChannelArgument(GRPC_ARG_ALLOW_REUSEPORT, 0);
  builder->AddChannelArgument(GRPC_ARG_KEEPALIVE_TIME_MS, kKeepaliveMs);
  builder->AddChannelArgument(GRPC_ARG_KEEPALIVE_TIMEOUT_MS, kKeepaliveTimeoutMs);
  builder->AddChannelArgument(GRPC_ARG_HTTP2_MAX_PINGS_WITHOUT_DATA, 0);
  builder->AddChannelArgument(GRPC_ARG_HTTP2_MIN_RECV_PING_INTERVAL_WITHOUT_DATA_MS, kKeepaliveMs / 2);
  builder->AddChannelArgument(GRPC_ARG_KEEPALIVE_PERMIT_WITHOUT_CALLS, 1);
}

StatusOr<std::unique_ptr<grpc::Server>> StartServer(grpc::ServerBuilder* builder, const std::string& listen,
                                                    std::shared_ptr<grpc::ServerCredentials> credentials,
                                                    std::string* address) {
  MR_ASSIGN_OR_RETURN(HostPort where, ParseHostPort(listen));
  int port = 0;
  builder->AddListeningPort(where.ToString(), std::move(credentials), &port);
  std::unique_ptr<grpc::Server> server = builder->BuildAndStart();
  if (server == nullptr || port == 0) return Unavailable("{}: {}", listen, BindError(where));
  where.port = static_cast<uint16_t>(port);
  *address = where.ToString();
  return server;
}

grpc::Status ToGrpc(const Status& status) {
  if (status.ok()) return grpc::Status::OK;
  return grpc::Status(static_cast<grpc::StatusCode>(status.code()), std::string(Message(status)));
}

Status FromGrpc(const grpc::Status& status) {
  return MakeStatus(static_cast<absl::StatusCode>(status.error_code()), status.error_message());
}

std::chrono::system_clock::time_point GrpcDeadline(TimePoint deadline) {
  using SystemClock = std::chrono::system_clock;
  if (deadline == kNoDeadline) return SystemClock::time_point::max();
  const Duration left = deadline - std::chrono::steady_clock::now();
  return SystemClock::now() + std::chrono::duration_cast<SystemClock::duration>(left);
}

ChannelPool::ChannelPool(std::shared_ptr<grpc::ChannelCredentials> credentials)
    : credentials_(std::move(credentials)) {}

std::shared_ptr<grpc::Channel> ChannelPool::Get(const std::string& address) {
  std::lock_guard lock(mutex_);
  if (const auto found = channels_.find(address); found != channels_.end()) return found->second;
  if (channels_.size() >= kChannelsMax) channels_.clear();
  auto channel = grpc::CreateCustomChannel(address, credentials_, ChannelArguments());
  channels_.emplace(address, channel);
  return channel;
}

void ChannelPool::Forget(const std::string& address) {
  std::lock_guard lock(mutex_);
  channels_.erase(address);
}

}  // namespace millrace::server
