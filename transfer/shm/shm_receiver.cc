#include "transfer/shm/shm_receiver.h"

#include <sys/epoll.h>

#include <algorithm>

#include "absl/container/flat_hash_map.h"
#include "base/log.h"
#include "transfer/wire.h"

namespace millrace::transfer {
namespace {

constexpr size_t kSessionsMax = 1024;
constexpr size_t kSlicesMax = 256;  // that one session may have under way; more is a broken peer
constexpr Duration kHelloTimeout = std::chrono::seconds(5);
// The bound of CloseTicket for reads: a reader that holds a closing ticket for so long loses its session, and
// with it the confirmation without which nothing that it read counts. Writes end with the copy going on.
constexpr Duration kClosingStall = std::chrono::milliseconds(200);

}  // namespace

class ShmReceiver::Session {
 public:
  Session(ShmReceiver* owner, UniqueFd fd)
      : owner_(owner),
        environment_(*owner->environment_),
        fd_(std::move(fd)),
        last_progress_(environment_.clock->Now()) {
    environment_.loop->Add(fd_.get(), EPOLLIN, [this](uint32_t) { OnReady(); });
  }
  ~Session() { Close(); }

  bool closed() const { return !fd_.valid(); }

  void Close() {
    if (closed()) return;
    environment_.loop->Remove(fd_.get());
    fd_.Reset();
    for (const auto& [slice, write] : std::exchange(writes_, {})) {
      owner_->copier_->Cancel(write->copy);
      environment_.landing->End(peer_epoch_, slice);
      environment_.memory->Unpin(write->ticket);
    }
    for (const auto& [slice, ticket] : std::exchange(reads_, {})) environment_.memory->Unpin(ticket);
    if (peer_epoch_ != 0) environment_.landing->Leave(peer_epoch_);
  }

  TimePoint Tick(TimePoint now) {
    if (peer_epoch_ == 0) {
      if (now - last_progress_ > kHelloTimeout) Close();
      return last_progress_ + kHelloTimeout + std::chrono::milliseconds(1);
    }
    // CloseTicket makes the loop tick, so an open ticket needs no watching.
    const bool closing = std::any_of(reads_.begin(), reads_.end(), [this](const auto& read) {
      return environment_.memory->IsClosing(read.second);
    });
    if (!closing) return kNoDeadline;
    if (now - last_progress_ > kClosingStall) {
      LogWarning(
          "transfer: process {} stopped in the middle of reading under a closing ticket; its session is "
          "closed",
          process_);
      Close();
      return kNoDeadline;
    }
    return last_progress_ + kClosingStall + std::chrono::milliseconds(1);
  }

 private:
  // A copy that is landing.
  struct Write : Lander {
    Session* session = nullptr;
    uint64_t slice = 0;
    TicketId ticket = 0;
    std::shared_ptr<Copier::Job> copy;  // shared with the copier's threads
    void Supersede() override { session->OnSuperseded(slice); }
  };

  void OnReady() {
    while (!closed()) {
      ShmMessage message;
      const ShmIo result = ShmReceive(fd_.get(), &message);
      if (result == ShmIo::kWouldBlock) return;
      if (result == ShmIo::kClosed) return Close();
      last_progress_ = environment_.clock->Now();
      OnMessage(message);
    }
  }

  void OnMessage(const ShmMessage& message) {
    if (peer_epoch_ == 0) return message.kind == ShmKind::kHello ? OnHello(message) : Stranger("no Hello");
    switch (message.kind) {
      case ShmKind::kWrite:
        return OnWrite(message);
      case ShmKind::kRead:
        return OnRead(message);
      case ShmKind::kReadDone:
        return OnReadDone(message);
      case ShmKind::kProbe:
        return Say({.kind = ShmKind::kProbeAnswer, .slice = message.slice});
      default:
        return Stranger("an unexpected message");
    }
  }

  void OnHello(const ShmMessage& message) {
    ShmMessage answer{.kind = ShmKind::kHelloAnswer,
                      .slice = environment_.epoch,
                      .offset = *owner_->token_,
                      .address = reinterpret_cast<uint64_t>(owner_->token_)};
    const auto process = ShmPeer(fd_.get());
    Status access = process.status();
    uint64_t token = 0;
    if (access.ok())
      access = ShmCopy(*process, message.address, reinterpret_cast<std::byte*>(&token), sizeof(token));
    if (access.ok() && token != message.offset)
      access = FailedPrecondition("process {} is not what its number says", *process);
    if (message.ticket != environment_.epoch || message.slice == 0) {
      answer.code = ShmCode::kOtherProcess;
    } else if (!access.ok()) {
      LogWarning("transfer: no shared-memory rail to a process of this host: {}", Message(access));
      answer.code = ShmCode::kNoAccess;
    }
    Say(answer);
    if (closed()) return;
    if (answer.code != ShmCode::kDone) return Close();
    process_ = *process;
    peer_epoch_ = message.slice;
    environment_.landing->Join(peer_epoch_);
  }

  void OnWrite(const ShmMessage& message) {
    // What a writer left behind when it ended the session is not read any more.
    if (ShmHungUp(fd_.get())) return Close();
    if (message.length == 0 || message.length > kSliceBytesLimit || writes_.size() >= kSlicesMax ||
        writes_.contains(message.slice))
      return Stranger("a slice that cannot be");
    auto write = std::make_unique<Write>();
    write->session = this;
    write->slice = message.slice;
    write->ticket = message.ticket;
    if (!environment_.landing->Begin(peer_epoch_, message.slice, message.attempt, message.retired_below,
                                     write.get()))
      return Answer(message.slice, ShmCode::kSuperseded);
    const auto admitted = environment_.memory->Admit(peer_epoch_, message.ticket, Operation::kWrite,
                                                     message.region, message.offset, message.length);
    if (!admitted.ok()) {
      environment_.landing->End(peer_epoch_, message.slice);
      ++owner_->counters_.slices_refused;
      return Answer(message.slice, ShmCode::kRefused);
    }
    const auto copy = std::make_shared<Copier::Job>();
    copy->process = process_;
    copy->from = message.address;
    copy->to = *admitted;
    copy->bytes = message.length;
    copy->done = [this, slice = message.slice](const Status& status) { OnCopied(slice, status); };
    write->copy = copy;
    writes_.emplace(message.slice, std::move(write));
    owner_->copier_->Start(copy);
  }

  void OnCopied(uint64_t slice, const Status& status) {
    if (!status.ok()) return Close();  // the writer is gone, or has unmapped its source
    const auto found = writes_.find(slice);
    const std::unique_ptr<Write> write = std::move(found->second);
    writes_.erase(found);
    last_progress_ = environment_.clock->Now();
    owner_->counters_.bytes_received += write->copy->bytes;
    environment_.landing->End(peer_epoch_, slice);
    Answer(slice, ShmCode::kDone);
    // After the answer: a drained ticket's owner may look at the memory at once, and nothing lands after
    // this.
    environment_.memory->Unpin(write->ticket);
  }

  // The landing table has forgotten this copy.
  void OnSuperseded(uint64_t slice) {
    const auto found = writes_.find(slice);
    const std::unique_ptr<Write> write = std::move(found->second);
    writes_.erase(found);
    owner_->copier_->Cancel(write->copy);
    environment_.memory->Unpin(write->ticket);
    // Not Say: the landing table is at work and must not be told of a closing. An answer that is lost makes
    // the writer give the session up.
    (void)ShmSend(fd_.get(), {.kind = ShmKind::kAnswer, .code = ShmCode::kSuperseded, .slice = slice});
  }

  void OnRead(const ShmMessage& message) {
    const auto from = environment_.memory->Admit(peer_epoch_, message.ticket, Operation::kRead,
                                                 message.region, message.offset, message.length);
    if (!from.ok()) {
      ++owner_->counters_.slices_refused;
      return Answer(message.slice, ShmCode::kRefused);
    }
    if (reads_.size() >= kSlicesMax || !reads_.emplace(message.slice, message.ticket).second) {
      environment_.memory->Unpin(message.ticket);
      return Stranger("too many reads at once");
    }
    Say({.kind = ShmKind::kReadable, .slice = message.slice, .address = reinterpret_cast<uint64_t>(*from)});
  }

  void OnReadDone(const ShmMessage& message) {
    const auto found = reads_.find(message.slice);
    if (found == reads_.end()) return Stranger("a read that was not asked for has ended");
    const TicketId ticket = found->second;
    reads_.erase(found);
    Say({.kind = ShmKind::kReadConfirmed, .slice = message.slice});
    environment_.memory->Unpin(ticket);
  }

  void Answer(uint64_t slice, ShmCode code) { Say({.kind = ShmKind::kAnswer, .code = code, .slice = slice}); }

  // A socket that is full has a peer that reads no answers.
  void Say(const ShmMessage& message) {
    if (!closed() && ShmSend(fd_.get(), message) != ShmIo::kDone) Close();
  }

  void Stranger(const char* why) {
    LogWarning("transfer: a session with a process of this host is closed: {}", why);
    Close();
  }

  ShmReceiver* const owner_;
  const RailEnvironment& environment_;
  UniqueFd fd_;
  TimePoint last_progress_;
  pid_t process_ = 0;
  uint64_t peer_epoch_ = 0;                                       // 0: no Hello yet
  absl::flat_hash_map<uint64_t, std::unique_ptr<Write>> writes_;  // landing: pinned, and in the landing table
  absl::flat_hash_map<uint64_t, TicketId> reads_;                 // pinned until the reader is done
};

ShmReceiver::ShmReceiver(const RailEnvironment* environment, Copier* copier, const uint64_t* token)
    : environment_(environment), copier_(copier), token_(token) {}

ShmReceiver::~ShmReceiver() { CloseAll(); }

Status ShmReceiver::Listen(const std::string& socket_name) {
  MR_ASSIGN_OR_RETURN(listener_, ShmListen(socket_name));
  environment_->loop->Add(listener_.get(), EPOLLIN, [this](uint32_t) { Accept(); });
  return OkStatus();
}

void ShmReceiver::Accept() {
  for (UniqueFd fd = ShmAccept(listener_.get()); fd.valid(); fd = ShmAccept(listener_.get())) {
    if (sessions_.size() < kSessionsMax) sessions_.push_back(std::make_unique<Session>(this, std::move(fd)));
  }
}

TimePoint ShmReceiver::Tick(TimePoint now) {
  TimePoint next = kNoDeadline;
  for (const auto& session : sessions_) {
    if (!session->closed()) next = std::min(next, session->Tick(now));
  }
  std::erase_if(sessions_, [](const auto& session) { return session->closed(); });
  return next;
}

void ShmReceiver::CloseAll() {
  if (listener_.valid()) environment_->loop->Remove(listener_.get());
  listener_.Reset();
  sessions_.clear();
}

}  // namespace millrace::transfer
