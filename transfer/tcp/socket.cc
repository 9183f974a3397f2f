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

// `local`: of family 0 when it is not known.
bool OnThisHost(const sockaddr_storage& local, const sockaddr_storage& remote) {
  if (remote.ss_family == AF_INET) {
    const auto host = [](const sockaddr_storage& address) {
      return ntohl(reinterpret_cast<const sockaddr_in*>(&address)->sin_addr.s_addr);
    };
    return host(remote) >> 24 == IN_LOOPBACKNET ||
           (local.ss_family == AF_INET && host(local) == host(remote));
  }
  const in6_addr& to = reinterpret_cast<const sockaddr_in6*>(&remote)->sin6_addr;
  return IN6_IS_ADDR_LOOPBACK(&to) ||
         (local.ss_family == AF_INET6 &&
          IN6_ARE_ADDR_EQUAL(&reinterpret_cast<const sockaddr_in6*>(&local)->sin6_addr, &to));
}

// Within one host nobody else fills a queue, and pacing (BBR) would cost half of what the processor can move.
void Tune(int fd, const sockaddr_storage& local, const sockaddr_storage& remote) {
  SetOption(fd, IPPROTO_TCP, TCP_NODELAY, 1);
  if (OnThisHost(local, remote)) setsockopt(fd, IPPROTO_TCP, TCP_CONGESTION, "reno", 4);
}

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
  SocketAddress from;
  if (!local_host.empty()) {
    MR_ASSIGN_OR_RETURN(from, ToSocketAddress({local_host, 0}));
    SetOption(fd.get(), IPPROTO_IP, IP_BIND_ADDRESS_NO_PORT, 1);
    if (from.storage.ss_family == to.storage.ss_family &&
        bind(fd.get(), reinterpret_cast<const sockaddr*>(&from.storage), from.size) != 0) {
      return Unavailable("cannot use the local rail {}: {}", local_host, Reason(errno));
    }
  }
  Tune(fd.get(), from.storage, to.storage);
  if (connect(fd.get(), reinterpret_cast<const sockaddr*>(&to.storage), to.size) != 0 &&
      errno != EINPROGRESS) {
    return Unavailable("cannot connect to rail {}: {}", remote.ToString(), Reason(errno));
  }
  return fd;
}

StatusOr<UniqueFd> AcceptTcp(int listener) {
  SocketAddress local, remote;
  local.size = remote.size = sizeof(sockaddr_storage);
  UniqueFd fd(accept4(listener, reinterpret_cast<sockaddr*>(&remote.storage), &remote.size,
                      SOCK_NONBLOCK | SOCK_CLOEXEC));
  if (!fd.valid()) return Unavailable("{}", Reason(errno));
  getsockname(fd.get(), reinterpret_cast<sockaddr*>(&local.storage), &local.size);
  Tune(fd.get(), local.storage, remote.storage);
  return fd;
}

Status SocketError(int fd) {
  int error = 0;
  socklen_t size = sizeof(error);
  getsockopt(fd, SOL_SOCKET, SO_ERROR, &error, &size);
  return error == 0 ? OkStatus() : Unavailable("{}", Reason(error));
}

}  // namespace millrace::transfer
