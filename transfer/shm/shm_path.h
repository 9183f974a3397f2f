#pragma once
// The initiating end of a session with another process of this host. Writes are read by the other side from
// this process's memory; reads are read by this side from the other's, which holds them until it has
// confirmed that they were held. So each process lands bytes only in its own memory, and what a dead or
// stopped peer still does can harm nobody. Transfer thread only.

#include <memory>
#include <string>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "transfer/rail.h"
#include "transfer/shm/copier.h"

namespace millrace::transfer {

class ShmPath : public Path {
 public:
  // `environment`, `copier` and `token` (what the other side reads to prove that it can) outlive the path.
  ShmPath(const RailEnvironment* environment, Copier* copier, const uint64_t* token, std::string socket_name,
          uint64_t peer_epoch);
  ~ShmPath() override { Drop(); }

  const PathTraits& traits() const override { return traits_; }
  void Connect() override;
  void Disconnect() override;
  void Send(const Slice& slice) override;
  void Probe(uint64_t probe) override;

 private:
  struct InFlight {
    std::span<std::byte> read_to;       // empty: a write
    std::shared_ptr<Copier::Job> copy;  // of a read, while it goes on; shared with the copier's threads
    bool copied = false;                // of a read: its confirmation is awaited
  };
  void OnReady();
  bool OnMessage(const ShmMessage& message);  // false: the session is over
  bool OnHelloAnswer(const ShmMessage& message);
  bool OnReadable(const ShmMessage& message);
  void OnCopied(uint64_t slice, const Status& status);
  void Report(uint64_t slice, SliceOutcome outcome);
  bool Say(const ShmMessage& message);  // false: the session is over
  void Drop();                          // the session and every copy, silently
  void ReportUnknown();
  void Break(const Status& why);

  const RailEnvironment* const environment_;
  Copier* const copier_;
  const uint64_t* const token_;
  const std::string socket_name_;
  const uint64_t peer_epoch_;
  const PathTraits traits_;
  UniqueFd fd_;
  pid_t peer_process_ = 0;
  bool ready_ = false;  // Hellos were exchanged
  absl::flat_hash_map<uint64_t, InFlight> in_flight_;
};

}  // namespace millrace::transfer
