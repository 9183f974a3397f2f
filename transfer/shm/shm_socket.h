#pragma once
// What two processes of one host tell each other: whole messages over a Unix socket (SOCK_SEQPACKET, abstract
// name). Bytes of slices never pass here: who receives them reads them from the other's memory
// (process_vm_readv), so that no process ever writes into another. Transfer thread only.

#include <sys/types.h>

#include <cstdint>
#include <string>

#include "base/file.h"
#include "base/status.h"

namespace millrace::transfer {

enum class ShmKind : uint32_t {
  kHello = 1,          // first, from the initiator
  kHelloAnswer = 2,    // `code` says whether the session stands
  kWrite = 3,          // read [address, length) of my memory into region + offset of yours
  kAnswer = 4,         // to a write, or to a read that is refused
  kRead = 5,           // let me read region + offset of yours
  kReadable = 6,       // it lies at `address`, held until kReadDone
  kReadDone = 7,       // I have read it
  kReadConfirmed = 8,  // it was held all the while: what was read is right
  kProbe = 9,
  kProbeAnswer = 10,
};

enum class ShmCode : uint32_t {
  kDone = 0,          // landed; or the session stands
  kRefused = 1,       // ticket, epoch or range
  kSuperseded = 2,    // a later copy of the slice has come
  kOtherProcess = 3,  // Hello: another epoch or protocol
  kNoAccess = 4,      // Hello: the other's memory cannot be read
};

// Both ends are on one host and of one build of this file (checked by kShmMagic): native byte order.
struct ShmMessage {
  uint64_t magic = 0;
  ShmKind kind = ShmKind::kProbe;
  ShmCode code = ShmCode::kDone;
  uint64_t slice = 0;    // answers and probes repeat it; Hello: the speaker's epoch
  uint64_t ticket = 0;   // Hello: the epoch that is looked for
  uint64_t offset = 0;   // Hello: a random number that lies at `address` in the speaker's memory
  uint64_t address = 0;  // in the speaker's memory
  uint64_t retired_below = 0;
  uint32_t region = 0;
  uint32_t length = 0;
  uint32_t attempt = 1;
  uint32_t zero = 0;
};
inline constexpr uint64_t kShmMagic = 0x31'6d'68'73'72'6c'6c'6dULL;

enum class ShmIo { kDone, kWouldBlock, kClosed };

StatusOr<UniqueFd> ShmListen(const std::string& name);
StatusOr<UniqueFd> ShmConnect(const std::string& name);
UniqueFd ShmAccept(int listener);  // invalid when nobody waits
ShmIo ShmSend(int fd, const ShmMessage& message);
// kClosed also for anything that is not a whole message of this version.
ShmIo ShmReceive(int fd, ShmMessage* message);

// The other end is closed, whatever it has said before.
bool ShmHungUp(int fd);

// The process at the other end, as this process may name it. FailedPrecondition when it cannot (another PID
// namespace) or when it belongs to another user.
StatusOr<pid_t> ShmPeer(int fd);
// Copies from another process's memory; all of it or an error that says why.
Status ShmCopy(pid_t process, uint64_t address, std::byte* to, size_t bytes);

// This boot of this host; empty when the kernel does not say.
std::string BootId();

}  // namespace millrace::transfer
