#include "transfer/shm/shm_socket.h"

#include <poll.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <sys/un.h>
#include <unistd.h>

#include <cerrno>
#include <cstddef>
#include <cstring>
#include <fstream>

namespace millrace::transfer {
namespace {

// An abstract name: it belongs to the network namespace, needs no file, and goes with its socket.
StatusOr<socklen_t> MakeAddress(const std::string& name, sockaddr_un* address) {
  *address = {};
  address->sun_family = AF_UNIX;
  if (name.empty() || name.size() > sizeof(address->sun_path) - 1)
    return InvalidArgument("a socket name of {} bytes", name.size());
  std::memcpy(address->sun_path + 1, name.data(), name.size());
  return static_cast<socklen_t>(offsetof(sockaddr_un, sun_path) + 1 + name.size());
}

StatusOr<UniqueFd> MakeSocket() {
  UniqueFd fd(socket(AF_UNIX, SOCK_SEQPACKET | SOCK_NONBLOCK | SOCK_CLOEXEC, 0));
  if (!fd.valid()) return Unavailable("a Unix socket: {}", std::strerror(errno));
  return fd;
}

}  // namespace

StatusOr<UniqueFd> ShmListen(const std::string& name) {
  sockaddr_un address;
  MR_ASSIGN_OR_RETURN(const socklen_t size, MakeAddress(name, &address));
  MR_ASSIGN_OR_RETURN(UniqueFd fd, MakeSocket());
  if (bind(fd.get(), reinterpret_cast<const sockaddr*>(&address), size) != 0 || listen(fd.get(), 128) != 0)
    return Unavailable("listening on '{}': {}", name, std::strerror(errno));
  return fd;
}

StatusOr<UniqueFd> ShmConnect(const std::string& name) {
  sockaddr_un address;
  MR_ASSIGN_OR_RETURN(const socklen_t size, MakeAddress(name, &address));
  MR_ASSIGN_OR_RETURN(UniqueFd fd, MakeSocket());
  if (connect(fd.get(), reinterpret_cast<const sockaddr*>(&address), size) != 0)
    return Unavailable("connecting to '{}': {}", name, std::strerror(errno));
  return fd;
}

UniqueFd ShmAccept(int listener) {
  return UniqueFd(accept4(listener, nullptr, nullptr, SOCK_NONBLOCK | SOCK_CLOEXEC));
}

ShmIo ShmSend(int fd, const ShmMessage& message) {
  ShmMessage stamped = message;
  stamped.magic = kShmMagic;
  const ssize_t sent = send(fd, &stamped, sizeof(stamped), MSG_NOSIGNAL);
  if (sent == sizeof(stamped)) return ShmIo::kDone;
  return sent < 0 && (errno == EAGAIN || errno == EINTR) ? ShmIo::kWouldBlock : ShmIo::kClosed;
}

ShmIo ShmReceive(int fd, ShmMessage* message) {
  const ssize_t got = recv(fd, message, sizeof(*message), MSG_TRUNC);
  if (got == sizeof(*message) && message->magic == kShmMagic) return ShmIo::kDone;
  return got < 0 && (errno == EAGAIN || errno == EINTR) ? ShmIo::kWouldBlock : ShmIo::kClosed;
}

bool ShmHungUp(int fd) {
  pollfd state{fd, 0, 0};
  return poll(&state, 1, 0) > 0 && (state.revents & (POLLHUP | POLLERR)) != 0;
}

StatusOr<pid_t> ShmPeer(int fd) {
  ucred peer{};
  socklen_t size = sizeof(peer);
  if (getsockopt(fd, SOL_SOCKET, SO_PEERCRED, &peer, &size) != 0)
    return FailedPrecondition("the other process is unknown: {}", std::strerror(errno));
  if (peer.pid <= 0) return FailedPrecondition("the other process is in another PID namespace");
  if (peer.uid != geteuid() && peer.uid != 0 && geteuid() != 0)
    return FailedPrecondition("process {} belongs to user {}", peer.pid, peer.uid);
  return peer.pid;
}

Status ShmCopy(pid_t process, uint64_t address, std::byte* to, size_t bytes) {
  while (bytes > 0) {
    const iovec local{to, bytes};
    const iovec remote{reinterpret_cast<void*>(address), bytes};
    const ssize_t got = process_vm_readv(process, &local, 1, &remote, 1, 0);
    if (got <= 0) {
      return Unavailable("memory of process {}: {}", process,
                         got == 0 ? "nothing could be read" : std::strerror(errno));
    }
    to += got;
    address += static_cast<uint64_t>(got);
    bytes -= static_cast<size_t>(got);
  }
  return OkStatus();
}

std::string BootId() {
  std::ifstream file("/proc/sys/kernel/random/boot_id");  // not a regular file: it has no size
  std::string id;
  std::getline(file, id);
  return id;
}

}  // namespace millrace::transfer
