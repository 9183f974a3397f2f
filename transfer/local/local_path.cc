#include "transfer/local/local_path.h"

#include <cstring>

#include "absl/container/flat_hash_map.h"

namespace millrace::transfer {
namespace {

struct ProcessList {
  std::mutex mutex;
  absl::flat_hash_map<uint64_t, std::shared_ptr<LocalProcess>> by_epoch;
};

ProcessList& List() {
  static ProcessList* const list =
      new ProcessList;  // never destroyed: engines may outlive static destruction
  return *list;
}

}  // namespace

SliceOutcome LocalProcess::Land(uint64_t sender_epoch, const Slice& slice) {
  const std::lock_guard lock(mutex_);
  if (memory_ == nullptr) return SliceOutcome::kPathFailed;
  const auto target = memory_->Admit(sender_epoch, slice.ticket, slice.remote_region, slice.remote_offset,
                                     static_cast<uint32_t>(slice.bytes.size()));
  if (!target.ok()) return SliceOutcome::kRefused;
  std::memcpy(*target, slice.bytes.data(), slice.bytes.size());
  memory_->Unpin(slice.ticket);
  return SliceOutcome::kLanded;
}

void LocalProcess::Leave() {
  const std::lock_guard lock(mutex_);
  memory_ = nullptr;
}

bool LocalProcess::present() const {
  const std::lock_guard lock(mutex_);
  return memory_ != nullptr;
}

void LocalProcess::Announce(uint64_t epoch, std::shared_ptr<LocalProcess> process) {
  const std::lock_guard lock(List().mutex);
  List().by_epoch[epoch] = std::move(process);
}

void LocalProcess::Withdraw(uint64_t epoch) {
  const std::lock_guard lock(List().mutex);
  List().by_epoch.erase(epoch);
}

std::shared_ptr<LocalProcess> LocalProcess::Find(uint64_t epoch) {
  const std::lock_guard lock(List().mutex);
  const auto found = List().by_epoch.find(epoch);
  return found == List().by_epoch.end() ? nullptr : found->second;
}

void LocalPath::Send(Slice slice) {
  const TimePoint start = Clock::System().Now();
  meter_.Sent(start, 0);
  sending_ = true;
  const SliceOutcome outcome = process_->Land(own_epoch_, slice);
  sending_ = false;
  last_heard_ = Clock::System().Now();
  if (outcome == SliceOutcome::kLanded) meter_.Landed(last_heard_, start, slice.bytes.size(), true, 0);
  events_.slice_done(slice, outcome);
}

TimePoint LocalPath::Tick(TimePoint now) {
  if (closed_) return kNoDeadline;
  if (!up()) {
    events_.refused(Unavailable("the peer of this process has ended"));
    return kNoDeadline;
  }
  last_heard_ = now;
  return kNoDeadline;
}

PathSnapshot LocalPath::Describe() const {
  PathSnapshot snapshot;
  snapshot.local_rail = "local";
  snapshot.remote_rail = "local";
  snapshot.state = up() ? "up" : "down";
  meter_.Fill(&snapshot);
  return snapshot;
}

}  // namespace millrace::transfer
