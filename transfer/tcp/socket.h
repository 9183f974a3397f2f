#pragma once
// Non-blocking TCP sockets with the options that a rail wants. Errors say the address and the system's
// reason.

#include <span>
#include <string>

#include "base/file.h"
#include "base/net.h"
#include "base/status.h"

namespace millrace::transfer {

// Listens on `address` (numeric). `bound` gets the port that was taken.
StatusOr<UniqueFd> ListenTcp(const HostPort& address, HostPort* bound);
// Begins to connect from `local_host` (empty: any) to `remote`. The socket becomes writable when that ended;
// see SocketError.
StatusOr<UniqueFd> ConnectTcp(const std::string& local_host, const HostPort& remote);
StatusOr<UniqueFd> AcceptTcp(int listener);  // Unavailable when nobody waits
// OK, or the error that the socket met.
Status SocketError(int fd);

enum class IoResult { kDone, kWouldBlock, kClosed };
// Reads up to data.size() bytes; `count` gets how many.
IoResult ReadSome(int fd, std::span<std::byte> data, size_t* count);
// Writes `first` then `second`, as much as goes.
IoResult WriteSome(int fd, std::span<const std::byte> first, std::span<const std::byte> second,
                   size_t* count);

}  // namespace millrace::transfer
