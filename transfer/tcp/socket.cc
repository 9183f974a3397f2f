#include "transfer/tcp/socket.h"

#include <arpa/inet.h>
#include <netdb.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <sys/socket.h>

#include <cerrno>
#include <cstring>
#include <system_error>

namespace millrace::transfer {
namespace {

struct SocketAddress {
  sockaddr_storage storage{};
  socklen_t size = 0;
};

StatusOr<SocketAddress> ToSocketAddress(const HostPort& address) {
  SocketAddress result;
  auto* const v4 = reinterpret_cast<sockaddr_in*>(&result.storage);
  auto* const v6 = reinterpret_cast<sockaddr_in6*>(&result.storage);
  if (inet_pton(AF_INET, address.host.c_str(), &v4->sin_addr) == 1) {
    v4->sin_family = AF_INET;
    v4->sin_port = htons(address.port);
    result.size = sizeof(sockaddr_in);
  } else if (inet_pton(AF_INET6, address.host.c_str(), &v6->sin6_addr) == 1) {
    v6->sin6_family = AF_INET6;
    v6->sin6_port = htons(address.port);
    result.size = sizeof(sockaddr_in6);
  } else {
    return InvalidArgument("'{}' is not a numeric address", address.host);
  }
  return result;
}

std::string Reason(int error) { return std::generic_category().message(error); }

void SetOption(int fd, int level, int name, int value) { setsockopt(fd, level, name, &value, sizeof(value)); }

}  // namespace

StatusOr<UniqueFd> ListenTcp(const HostPort& address, HostPort* bound) {
  MR_ASSIGN_OR_RETURN(SocketAddress at, ToSocketAddress(address));
  UniqueFd fd(socket(at.storage.ss_family, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0));
  if (!fd.valid()) return Unavailable("rail {}: {}", address.ToString(), Reason(errno));
  SetOption(fd.get(), SOL_SOCKET, SO_REUSEADDR, 1);
  if (bind(fd.get(), reinterpret_cast<sockaddr*>(&at.storage), at.size) != 0 || listen(fd.get(), 512) != 0) {
    return Unavailable("cannot listen on rail {}: {}", address.ToString(), Reason(errno));
  }
  socklen_t size = sizeof(at.storage);
  getsockname(fd.get(), reinterpret_cast<sockaddr*>(&at.storage), &size);
  *bound = address;
  bound->port =
      ntohs(at.storage.ss_family == AF_INET ? reinterpret_cast<sockaddr_in*>(&at.storage)->sin_port
                                            : reinterpret_cast<sockaddr_in6*>(&at.storage)->sin6_port);
  return fd;
}

StatusOr<UniqueFd> ConnectTcp(const std::string& local_host, const HostPort& remote) {
  MR_ASSIGN_OR_RETURN(const SocketAddress to, ToSocketAddress(remote));
  UniqueFd fd(socket(to.storage.ss_family, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0));
  if (!fd.valid()) return Unavailable("rail to {}: {}", remote.ToString(), Reason(errno));
  SetOption(fd.get(), IPPROTO_TCP, TCP_NODELAY, 1);
  if (!local_host.empty()) {
    MR_ASSIGN_OR_RETURN(const SocketAddress from, ToSocketAddress({local_host, 0}));
    SetOption(fd.get(), IPPROTO_IP, IP_BIND_ADDRESS_NO_PORT, 1);
    if (from.storage.ss_family == to.storage.ss_family &&
        bind(fd.get(), reinterpret_cast<const sockaddr*>(&from.storage), from.size) != 0) {
      return Unavailable("cannot use the local rail {}: {}", local_host, Reason(errno));
    }
  }
  if (connect(fd.get(), reinterpret_cast<const sockaddr*>(&to.storage), to.size) != 0 &&
      errno != EINPROGRESS) {
    return Unavailable("cannot connect to rail {}: {}", remote.ToString(), Reason(errno));
  }
  return fd;
}

StatusOr<UniqueFd> AcceptTcp(int listener) {
  UniqueFd fd(accept4(listener, nullptr, nullptr, SOCK_NONBLOCK | SOCK_CLOEXEC));
  if (!fd.valid()) return Unavailable("{}", Reason(errno));
  SetOption(fd.get(), IPPROTO_TCP, TCP_NODELAY, 1);
  return fd;
}

Status SocketError(int fd) {
  int error = 0;
  socklen_t size = sizeof(error);
  getsockopt(fd, SOL_SOCKET, SO_ERROR, &error, &size);
  return error == 0 ? OkStatus() : Unavailable("{}", Reason(error));
}

}  // namespace millrace::transfer
