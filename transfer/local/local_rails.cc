#include "transfer/local/local_rails.h"

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

// Every slice is over when Send returns.
class LocalPath : public Path {
 public:
  LocalPath(std::shared_ptr<LocalProcess> process, uint64_t own_epoch)
      : process_(std::move(process)), own_epoch_(own_epoch) {}
  const PathTraits& traits() const override { return traits_; }
  void Connect() override {
    if (process_->present()) return owner_->OnConnected(this);
    const Status gone = Unavailable("the peer of this process has ended");
    owner_->OnRefused(gone);
    owner_->OnBroken(this, gone);
  }
  void Disconnect() override {}
  void Send(const Slice& slice) override {
    const SliceOutcome outcome = process_->Carry(own_epoch_, slice);
    if (outcome == SliceOutcome::kUnknown) owner_->OnBroken(this, Unavailable("the peer has ended"));
    owner_->OnSliceDone(this, slice.id, outcome);
  }
  void Probe(uint64_t probe) override {
    if (process_->present()) return owner_->OnProbeDone(this, probe);
    owner_->OnBroken(this, Unavailable("the peer has ended"));
  }

 private:
  const std::shared_ptr<LocalProcess> process_;  // shared with the list and other paths
  const uint64_t own_epoch_;
  const PathTraits traits_{.kind = "local", .local_rail = "local", .remote_rail = "local"};
};

}  // namespace

SliceOutcome LocalProcess::Carry(uint64_t sender_epoch, const Slice& slice) {
  const std::lock_guard lock(mutex_);
  if (memory_ == nullptr) return SliceOutcome::kUnknown;
  const auto remote = memory_->Admit(sender_epoch, slice.ticket, slice.operation, slice.remote_region,
                                     slice.remote_offset, static_cast<uint32_t>(slice.local.size()));
  if (!remote.ok()) return SliceOutcome::kRefused;
  if (slice.operation == Operation::kWrite) {
    std::memcpy(*remote, slice.local.data(), slice.local.size());
  } else {
    std::memcpy(slice.local.data(), *remote, slice.local.size());
  }
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

LocalRails::LocalRails(const RailEnvironment& environment)
    : environment_(environment), process_(std::make_shared<LocalProcess>(environment.memory)) {
  LocalProcess::Announce(environment_.epoch, process_);
}

LocalRails::~LocalRails() {
  LocalProcess::Withdraw(environment_.epoch);
  process_->Leave();
}

StatusOr<std::vector<std::unique_ptr<Path>>> LocalRails::MakePaths(const RemotePeer& peer, ControlChannel*) {
  std::vector<std::unique_ptr<Path>> paths;
  const bool both_have_rails = !environment_.options->listen.empty() && !peer.rails.empty();
  if (both_have_rails && environment_.options->kinds.empty()) return paths;
  if (auto process = LocalProcess::Find(peer.epoch); process != nullptr)
    paths.push_back(std::make_unique<LocalPath>(std::move(process), environment_.epoch));
  return paths;
}

}  // namespace millrace::transfer
