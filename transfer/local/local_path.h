#pragma once
// The way between two transfer engines of one process: a copy, behind the same tickets. Also the list of
// engines in this process, by epoch.

#include <memory>
#include <mutex>

#include "transfer/memory_table.h"
#include "transfer/path.h"

namespace millrace::transfer {

// One engine of this process as others see it. Shared by the list and by those who copy; Leave() ends all
// copying.
class LocalProcess {
 public:
  explicit LocalProcess(MemoryTable* memory) : memory_(memory) {}
  // Lands one slice. kPathFailed after Leave.
  SliceOutcome Land(uint64_t sender_epoch, const Slice& slice);
  void Leave();  // waits for a copy that is going on; none begins after
  bool present() const;

  static void Announce(uint64_t epoch, std::shared_ptr<LocalProcess> process);
  static void Withdraw(uint64_t epoch);
  static std::shared_ptr<LocalProcess> Find(uint64_t epoch);  // null when there is none

 private:
  mutable std::mutex mutex_;
  MemoryTable* memory_;  // null after Leave
};

class LocalPath : public Path {
 public:
  LocalPath(std::shared_ptr<LocalProcess> process, uint64_t own_epoch, PathEvents events)
      : process_(std::move(process)), own_epoch_(own_epoch), events_(std::move(events)) {}
  bool HasRoom() const override { return up() && !sending_; }
  void Send(Slice slice) override;
  bool up() const override { return !closed_ && process_->present(); }
  TimePoint last_heard() const override { return last_heard_; }
  TimePoint Tick(TimePoint now) override;
  void Close() override { closed_ = true; }
  PathSnapshot Describe() const override;

 private:
  const std::shared_ptr<LocalProcess> process_;  // shared with the list and other paths
  const uint64_t own_epoch_;
  const PathEvents events_;
  bool sending_ = false;
  bool closed_ = false;
  TimePoint last_heard_{};
  PathMeter meter_;
};

}  // namespace millrace::transfer
