#include "transfer/tcp/tcp_receiver.h"

#include <sys/epoll.h>

#include <algorithm>

#include "absl/container/flat_hash_map.h"
#include "base/log.h"
#include "proto/transfer.pb.h"
#include "transfer/tcp/frame_stream.h"

namespace millrace::transfer {
namespace {

constexpr size_t kConnectionsMax = 4096;
constexpr size_t kReadsMax = 256;  // answers with data that wait on one connection; more is a broken peer
constexpr Duration kHelloTimeout = std::chrono::seconds(5);
// The bound of CloseTicket: an admitted slice that makes no progress for so long loses its connection. The
// teardown, not the time, is what proves that nothing lands any more.
constexpr Duration kClosingStall = std::chrono::milliseconds(200);

}  // namespace

class TcpReceiver::Connection : public FrameStream::Handler, public Lander, public ControlChannel {
 public:
  Connection(TcpReceiver* owner, UniqueFd fd)
      : owner_(owner),
        environment_(*owner->environment_),
        last_progress_(environment_.clock->Now()),
        stream_(environment_.loop, std::move(fd), false, this) {}
  ~Connection() override { Close(); }

  bool closed() const { return stream_.closed(); }

  void Close() {
    stream_.Close();
    LetGo();
  }

  TimePoint Tick(TimePoint now) {
    if (peer_epoch_ == 0) {
      if (now - last_progress_ > kHelloTimeout) Close();
      return last_progress_ + kHelloTimeout + std::chrono::milliseconds(1);
    }
    if (!landing_ && reads_.empty()) return kNoDeadline;
    const bool closing = (landing_ && environment_.memory->IsClosing(frame_.ticket)) ||
                         std::any_of(reads_.begin(), reads_.end(), [this](const auto& read) {
                           return environment_.memory->IsClosing(read.second);
                         });
    // CloseTicket makes the loop tick, so an open ticket needs no watching.
    if (!closing) return kNoDeadline;
    if (now - last_progress_ > kClosingStall) {
      LogWarning(
          "transfer: a peer stopped in the middle of a slice of a closing ticket; its connection is closed");
      Close();
      return kNoDeadline;
    }
    return last_progress_ + kClosingStall + std::chrono::milliseconds(1);
  }

 private:
  void OnConnected() override {}

  bool OnHello(std::string_view message) override {
    v1::Hello hello;
    if (!hello.ParseFromArray(message.data(), static_cast<int>(message.size()))) {
      Stranger("a damaged Hello");
      return false;
    }
    v1::Hello answer;
    answer.set_protocol_version(kProtocolVersion);
    answer.set_epoch(environment_.epoch);
    if (hello.protocol_version() != kProtocolVersion) {
      answer.set_refusal(fmt::format("protocol version {} is spoken here", kProtocolVersion));
    } else if (hello.expected_epoch() != environment_.epoch) {
      answer.set_refusal("the process has restarted: its epoch is another");
    } else if (hello.epoch() == 0) {
      answer.set_refusal("epoch 0");
    }
    stream_.SendHello(answer.SerializeAsString());
    if (!answer.refusal().empty()) return false;
    peer_epoch_ = hello.epoch();
    control_ = hello.purpose() == v1::Hello::CONTROL;
    environment_.landing->Join(peer_epoch_);
    return true;
  }

  std::byte* OnHeader(const Frame& frame) override {
    frame_ = frame;
    refused_ = superseded_ = landing_ = false;
    if (control_ && frame.kind != FrameKind::kProbe) {
      Stranger("a slice on a control session");
      return nullptr;
    }
    if (frame.kind != FrameKind::kSlice) return nullptr;
    if (!environment_.landing->Begin(peer_epoch_, frame.slice, frame.attempt, frame.retired_below, this)) {
      superseded_ = true;
      return nullptr;
    }
    auto admitted = environment_.memory->Admit(peer_epoch_, frame.ticket, Operation::kWrite, frame.region,
                                               frame.offset, frame.length);
    if (!admitted.ok()) {
      environment_.landing->End(peer_epoch_, frame.slice);
      refused_ = true;
      return nullptr;
    }
    landing_ = true;
    return *admitted;
  }

  void OnProgress(size_t bytes) override {
    last_progress_ = environment_.clock->Now();
    owner_->counters_.bytes_received += bytes;
  }

  void OnFrame(const Frame& frame, bool right) override {
    switch (frame.kind) {
      case FrameKind::kSlice:
        return OnSlice(frame, right);
      case FrameKind::kReadRequest:
        return OnRead(frame);
      case FrameKind::kProbe:
        return stream_.Send({.kind = FrameKind::kProbeAnswer, .slice = frame.slice});
      default:
        return Stranger("an unexpected frame");
    }
  }

  void OnSlice(const Frame& frame, bool right) {
    if (refused_ || (!superseded_ && !right)) ++owner_->counters_.slices_refused;
    Answer(frame.slice, superseded_ ? SliceCode::kSuperseded
                        : refused_  ? SliceCode::kRefused
                        : right     ? SliceCode::kLanded
                                    : SliceCode::kBadChecksum);
    // After the answer is queued: a drained ticket's owner may look at the memory at once, and nothing lands
    // after this.
    LandingOver();
  }

  void OnRead(const Frame& frame) {
    auto from = environment_.memory->Admit(peer_epoch_, frame.ticket, Operation::kRead, frame.region,
                                           frame.offset, frame.length);
    if (!from.ok()) {
      ++owner_->counters_.slices_refused;
      return Answer(frame.slice, SliceCode::kRefused);
    }
    if (reads_.size() >= kReadsMax || !reads_.emplace(frame.slice, frame.ticket).second) {
      environment_.memory->Unpin(frame.ticket);
      return Stranger("too many reads at once");
    }
    if (reads_.size() == 1) last_progress_ = environment_.clock->Now();
    const std::span<const std::byte> data(*from, frame.length);
    stream_.Send({.kind = FrameKind::kReadData, .slice = frame.slice, .length = frame.length}, data);
  }

  // The kernel has copied what was read: its memory is no longer looked at.
  void OnSent(const Frame& frame) override {
    last_progress_ = environment_.clock->Now();
    const auto found = reads_.find(frame.slice);
    if (found == reads_.end()) return;
    const TicketId ticket = found->second;
    reads_.erase(found);
    environment_.memory->Unpin(ticket);
  }

  void OnMessage(std::string_view body) override {
    v1::RailMessage message;
    if (!control_ || !message.ParseFromArray(body.data(), static_cast<int>(body.size())))
      return Stranger("a damaged control message");
    environment_.on_control(this, message.kind(), message.body());
  }

  bool SendMessage(const std::string& kind, const std::string& body) override {
    if (closed()) return false;
    v1::RailMessage message;
    message.set_kind(kind);
    message.set_body(body);
    stream_.SendMessage(message.SerializeAsString());
    return true;
  }
  uint64_t peer_epoch() const override { return peer_epoch_; }

  void OnClosed(const Status&) override { LetGo(); }

  void Supersede() override {
    stream_.DropPayload();
    superseded_ = true;
    landing_ = false;
    environment_.memory->Unpin(frame_.ticket);
  }

  void Answer(uint64_t slice, SliceCode code) {
    stream_.Send({.kind = FrameKind::kAnswer, .code = code, .slice = slice});
  }

  void Stranger(const char* why) {
    LogWarning("transfer: a connection is closed: {}", why);
    Close();
  }

  void LandingOver() {
    if (!landing_) return;
    landing_ = false;
    environment_.landing->End(peer_epoch_, frame_.slice);
    environment_.memory->Unpin(frame_.ticket);
  }

  // The socket is closed: whatever this connection held is free.
  void LetGo() {
    LandingOver();
    for (const auto& [slice, ticket] : std::exchange(reads_, {})) environment_.memory->Unpin(ticket);
    if (peer_epoch_ == 0 || left_) return;
    left_ = true;
    environment_.landing->Leave(peer_epoch_);
    if (control_) environment_.on_control_closed(this);
  }

  TcpReceiver* const owner_;
  const RailEnvironment& environment_;
  TimePoint last_progress_;
  uint64_t peer_epoch_ = 0;  // 0: no Hello yet
  bool control_ = false;
  bool left_ = false;
  Frame frame_;           // being read
  bool landing_ = false;  // into granted memory: its ticket is pinned and the landing table knows
  bool refused_ = false;
  bool superseded_ = false;
  absl::flat_hash_map<uint64_t, TicketId> reads_;  // being sent; their tickets are pinned
  FrameStream stream_;                             // last: its handler's state outlives it
};

TcpReceiver::TcpReceiver(const RailEnvironment* environment) : environment_(environment) {}

TcpReceiver::~TcpReceiver() { CloseAll(); }

Status TcpReceiver::Listen(const HostPort& address, HostPort* bound) {
  MR_ASSIGN_OR_RETURN(UniqueFd fd, ListenTcp(address, bound));
  const int raw = fd.get();
  environment_->loop->Add(raw, EPOLLIN, [this, raw](uint32_t) { Accept(raw); });
  listeners_.push_back(std::move(fd));
  return OkStatus();
}

void TcpReceiver::Accept(int listener) {
  while (true) {
    auto fd = AcceptTcp(listener);
    if (!fd.ok()) return;
    if (connections_.size() >= kConnectionsMax) continue;  // closes it
    connections_.push_back(std::make_unique<Connection>(this, *std::move(fd)));
  }
}

TimePoint TcpReceiver::Tick(TimePoint now) {
  TimePoint next = kNoDeadline;
  for (const auto& connection : connections_) {
    if (!connection->closed()) next = std::min(next, connection->Tick(now));
  }
  std::erase_if(connections_, [](const auto& connection) { return connection->closed(); });
  return next;
}

void TcpReceiver::CloseAll() {
  for (const UniqueFd& fd : listeners_) environment_->loop->Remove(fd.get());
  listeners_.clear();
  connections_.clear();
}

}  // namespace millrace::transfer
