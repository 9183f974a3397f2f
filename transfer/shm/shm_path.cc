#include "transfer/shm/shm_path.h"

#include <sys/epoll.h>

#include <algorithm>

#include "base/check.h"

namespace millrace::transfer {

ShmPath::ShmPath(const RailEnvironment* environment, Copier* copier, const uint64_t* token,
                 std::string socket_name, uint64_t peer_epoch)
    : environment_(environment),
      copier_(copier),
      token_(token),
      socket_name_(std::move(socket_name)),
      peer_epoch_(peer_epoch),
      traits_{.kind = "shm", .local_rail = "shm", .remote_rail = "shm"} {}

void ShmPath::Connect() {
  auto fd = ShmConnect(socket_name_);
  if (!fd.ok()) return owner_->OnBroken(this, fd.status());
  fd_ = *std::move(fd);
  const auto process = ShmPeer(fd_.get());
  if (!process.ok()) return Break(process.status());
  peer_process_ = *process;
  environment_->loop->Add(fd_.get(), EPOLLIN, [this](uint32_t) { OnReady(); });
  Say({.kind = ShmKind::kHello,
       .slice = environment_->epoch,
       .ticket = peer_epoch_,
       .offset = *token_,
       .address = reinterpret_cast<uint64_t>(token_)});
}

void ShmPath::OnReady() {
  while (fd_.valid()) {
    ShmMessage message;
    const ShmIo result = ShmReceive(fd_.get(), &message);
    if (result == ShmIo::kWouldBlock) return;
    if (result == ShmIo::kClosed) return Break(Unavailable("the other process has closed the session"));
    if (!OnMessage(message)) return;
  }
}

bool ShmPath::OnMessage(const ShmMessage& message) {
  if (message.kind == ShmKind::kHelloAnswer && !ready_) return OnHelloAnswer(message);
  if (ready_ && message.kind == ShmKind::kProbeAnswer) {
    owner_->OnProbeDone(this, message.slice);
    return true;
  }
  const auto found = in_flight_.find(message.slice);
  if (ready_ && found != in_flight_.end()) {
    const InFlight& slice = found->second;
    const bool read = !slice.read_to.empty();
    if (message.kind == ShmKind::kReadable && read && slice.copy == nullptr && !slice.copied)
      return OnReadable(message);
    if (message.kind == ShmKind::kReadConfirmed && slice.copied) {
      Report(message.slice, SliceOutcome::kLanded);
      return true;
    }
    // A read ends with its confirmation, or with a refusal at once.
    const bool refused = message.code == ShmCode::kRefused;
    if (message.kind == ShmKind::kAnswer && (!read || (refused && slice.copy == nullptr && !slice.copied))) {
      Report(message.slice, refused                                ? SliceOutcome::kRefused
                            : message.code == ShmCode::kSuperseded ? SliceOutcome::kUnknown
                                                                   : SliceOutcome::kLanded);
      return true;
    }
  }
  Break(DataLoss("a message that answers nothing"));
  return false;
}

bool ShmPath::OnHelloAnswer(const ShmMessage& message) {
  if (message.code == ShmCode::kOtherProcess || message.slice != peer_epoch_) {
    const Status why = Unavailable("'{}' is not the process that was looked for", socket_name_);
    owner_->OnRefused(why);
    Break(why);
    return false;
  }
  if (message.code != ShmCode::kDone) {
    Break(FailedPrecondition("process {} may not read the memory of this one", peer_process_));
    return false;
  }
  uint64_t token = 0;
  Status status =
      ShmCopy(peer_process_, message.address, reinterpret_cast<std::byte*>(&token), sizeof(token));
  if (status.ok() && token != message.offset)
    status = FailedPrecondition("process {} is not what its number says", peer_process_);
  if (!status.ok()) {
    Break(status);
    return false;
  }
  ready_ = true;
  owner_->OnConnected(this);
  return fd_.valid();
}

void ShmPath::Send(const Slice& slice) {
  MR_CHECK(ready_);
  const bool write = slice.operation == Operation::kWrite;
  InFlight entry;
  if (!write) entry.read_to = slice.local;
  in_flight_.emplace(slice.id, std::move(entry));
  Say({.kind = write ? ShmKind::kWrite : ShmKind::kRead,
       .slice = slice.id,
       .ticket = slice.ticket,
       .offset = slice.remote_offset,
       .address = reinterpret_cast<uint64_t>(slice.local.data()),
       .retired_below = slice.retired_below,
       .region = slice.remote_region,
       .length = static_cast<uint32_t>(slice.local.size()),
       .attempt = slice.attempt});
}

void ShmPath::Probe(uint64_t probe) {
  MR_CHECK(ready_);
  Say({.kind = ShmKind::kProbe, .slice = probe});
}

bool ShmPath::OnReadable(const ShmMessage& message) {
  InFlight& slice = in_flight_.at(message.slice);
  slice.copy = std::make_shared<Copier::Job>();
  slice.copy->process = peer_process_;
  slice.copy->from = message.address;
  slice.copy->to = slice.read_to.data();
  slice.copy->bytes = slice.read_to.size();
  slice.copy->done = [this, id = message.slice](const Status& status) { OnCopied(id, status); };
  copier_->Start(std::shared_ptr(slice.copy));  // a copy in place may end, and erase, the entry
  return fd_.valid();
}

void ShmPath::OnCopied(uint64_t slice, const Status& status) {
  InFlight& entry = in_flight_.at(slice);
  entry.copy = nullptr;
  entry.copied = true;
  if (!status.ok()) return Break(status);
  Say({.kind = ShmKind::kReadDone, .slice = slice});
}

void ShmPath::Report(uint64_t slice, SliceOutcome outcome) {
  in_flight_.erase(slice);
  owner_->OnSliceDone(this, slice, outcome);
}

// The socket holds more than slices_in_flight_max messages: one that is full has a peer that does not read.
bool ShmPath::Say(const ShmMessage& message) {
  if (ShmSend(fd_.get(), message) == ShmIo::kDone) return true;
  Break(Unavailable("the other process takes no messages"));
  return false;
}

void ShmPath::Drop() {
  for (auto& [id, slice] : in_flight_) {
    if (slice.copy != nullptr) copier_->Cancel(slice.copy);
  }
  ready_ = false;
  if (fd_.valid()) environment_->loop->Remove(fd_.get());
  fd_.Reset();
}

// No copy into this process goes on. The other side may still read what was to be written: that touches
// nothing here, and its landing table lets nothing of it land over a later copy.
void ShmPath::ReportUnknown() {
  std::vector<uint64_t> lost;
  for (const auto& [id, slice] : in_flight_) lost.push_back(id);
  std::sort(lost.begin(), lost.end());
  in_flight_.clear();
  for (const uint64_t id : lost) owner_->OnSliceDone(this, id, SliceOutcome::kUnknown);
}

void ShmPath::Break(const Status& why) {
  Drop();
  owner_->OnBroken(this, why);  // disconnects
}

void ShmPath::Disconnect() {
  Drop();
  ReportUnknown();
}

}  // namespace millrace::transfer
