#pragma once
// Non-blocking TCP sockets with the options that a rail wants. Errors say the address and the system's
// reason.

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

}  // namespace millrace::transfer
