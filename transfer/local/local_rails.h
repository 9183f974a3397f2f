#pragma once
// The way between two transfer engines of one process: a copy, behind the same tickets. Also the list of
// engines in this process, by epoch.

#include <memory>
#include <mutex>

#include "transfer/rail.h"

namespace millrace::transfer {

// One engine of this process as others see it. Shared by the list and by those who copy; Leave() ends all
// copying.
class LocalProcess {
 public:
  explicit LocalProcess(MemoryTable* memory) : memory_(memory) {}
  // Carries one slice, either way. kUnknown after Leave.
  SliceOutcome Carry(uint64_t sender_epoch, const Slice& slice);
  void Leave();  // waits for a copy that is going on; none begins after
  bool present() const;

  static void Announce(uint64_t epoch, std::shared_ptr<LocalProcess> process);
  static void Withdraw(uint64_t epoch);
  static std::shared_ptr<LocalProcess> Find(uint64_t epoch);  // null when there is none

 private:
  mutable std::mutex mutex_;
  MemoryTable* memory_;  // null after Leave
};

class LocalRails : public RailKind {
 public:
  explicit LocalRails(const RailEnvironment& environment);
  ~LocalRails() override;

  const char* name() const override { return "local"; }
  Status Start() override { return OkStatus(); }
  std::vector<RailAddress> Addresses() const override { return {}; }  // found by epoch
  // Used unless both sides were given rails, or if the options name this kind.
  StatusOr<std::vector<std::unique_ptr<Path>>> MakePaths(const RemotePeer& peer,
                                                         ControlChannel* control) override;
  void CloseAll() override { process_->Leave(); }

 private:
  const RailEnvironment environment_;
  const std::shared_ptr<LocalProcess>
      process_;  // shared with the process's list and with paths to this engine
};

}  // namespace millrace::transfer
