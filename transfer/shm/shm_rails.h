#pragma once
// The shared-memory kind of rail: between two processes of one host that may read each other's memory
// (process_vm_readv: the same user, or CAP_SYS_PTRACE, and Yama's ptrace_scope at most 0; one PID and network
// namespace). Where that is not so the kind has no paths, or its path stays down with the reason, and other
// rails carry everything.

#include <memory>
#include <string>
#include <vector>

#include "transfer/shm/shm_path.h"
#include "transfer/shm/shm_receiver.h"

namespace millrace::transfer {

class ShmRails : public RailKind {
 public:
  explicit ShmRails(const RailEnvironment& environment);

  const char* name() const override { return "shm"; }
  Status Start() override;
  std::vector<RailAddress> Addresses() const override;
  // For a peer of the same boot of the same host that is not in this process; for one in this process only if
  // the options name this kind.
  StatusOr<std::vector<std::unique_ptr<Path>>> MakePaths(const RemotePeer& peer,
                                                         ControlChannel* control) override;
  TimePoint Tick(TimePoint now) override { return receiver_.Tick(now); }
  void CloseAll() override { receiver_.CloseAll(); }
  ReceiverCounters counters() const override { return receiver_.counters(); }

 private:
  const RailEnvironment environment_;
  const uint64_t token_;  // read by peers to see whether they can
  Copier copier_;
  ShmReceiver receiver_;
  std::string address_;  // "boot id/socket name"; empty: this kind does not work here
};

}  // namespace millrace::transfer
