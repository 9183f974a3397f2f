#include "transfer/tcp/tcp_receiver.h"

#include <sys/epoll.h>

#include <algorithm>
#include <array>
#include <cstring>

#include "base/digest.h"
#include "base/log.h"
#include "proto/transfer.pb.h"

namespace millrace::transfer {
namespace {

constexpr size_t kConnectionsMax = 1024;
constexpr size_t kAnswerBytesMax = 1 << 20;  // a peer that reads no answers is read no further
constexpr size_t kScratchBytes = 64 << 10;   // refused payload goes through here
constexpr Duration kHelloTimeout = std::chrono::seconds(5);
// The bound of CloseTicket: an admitted slice that makes no progress for so long loses its connection. The
// teardown, not the time, is what proves that nothing lands any more.
constexpr Duration kClosingStall = std::chrono::milliseconds(200);

}  // namespace

class TcpReceiver::Connection {
 public:
  Connection(TcpReceiver* owner, UniqueFd fd)
      : owner_(owner), fd_(std::move(fd)), last_progress_(Clock::System().Now()) {
    owner_->loop_->Add(fd_.get(), EPOLLIN, [this](uint32_t events) { OnReady(events); });
  }
  ~Connection() { Close(); }

  bool closed() const { return !fd_.valid(); }

  void Close() {
    if (closed()) return;
    owner_->loop_->Remove(fd_.get());
    fd_.Reset();
    if (landing_) owner_->memory_->Unpin(frame_.ticket);
    landing_ = nullptr;
  }

  TimePoint Tick(TimePoint now) {
    if (state_ == State::kHello) {
      if (now - last_progress_ > kHelloTimeout) Close();
      return last_progress_ + kHelloTimeout + std::chrono::milliseconds(1);
    }
    if (landing_ == nullptr) return kNoDeadline;
    if (!owner_->memory_->IsClosing(frame_.ticket)) return now + kClosingStall;
    if (now - last_progress_ > kClosingStall) {
      LogWarning(
          "transfer: a peer stopped in the middle of a slice of a closing ticket; its connection is closed");
      Close();
      return kNoDeadline;
    }
    return last_progress_ + kClosingStall + std::chrono::milliseconds(1);
  }

 private:
  enum class State { kHello, kHeader, kPayload, kLeaving };

  void OnReady(uint32_t events) {
    if ((events & EPOLLOUT) != 0) Flush();
    if (!closed() && (events & (EPOLLIN | EPOLLHUP | EPOLLERR)) != 0) Read();
  }

  void Read() {
    // A bounded share per round, so that one busy connection does not keep others waiting.
    size_t budget = 4 << 20;
    while (!closed() && state_ != State::kLeaving && answers_.size() < kAnswerBytesMax && budget > 0) {
      const std::span<std::byte> target = Target();
      size_t got = 0;
      const IoResult result = ReadSome(fd_.get(), target, &got);
      if (result == IoResult::kWouldBlock) break;
      if (result == IoResult::kClosed) return Close();
      last_progress_ = Clock::System().Now();
      budget -= std::min(budget, got);
      Consume(target.first(got));
    }
    if (!closed()) Flush();
  }

  // Where the next bytes belong.
  std::span<std::byte> Target() {
    switch (state_) {
      case State::kHello:
        return std::span(hello_).subspan(received_, HelloBytesWanted());
      case State::kHeader:
        return std::span(header_).subspan(received_);
      default:
        break;
    }
    const size_t left = frame_.length - received_;
    if (landing_ != nullptr) return {landing_ + received_, left};
    scratch_.resize(kScratchBytes);
    return std::span(scratch_).first(std::min(left, scratch_.size()));
  }

  size_t HelloBytesWanted() const {
    if (received_ < sizeof(uint32_t)) return sizeof(uint32_t) - received_;
    return sizeof(uint32_t) + HelloSize() - received_;
  }

  uint32_t HelloSize() const {
    uint32_t size = 0;
    std::memcpy(&size, hello_.data(), sizeof(size));
    return size;
  }

  void Consume(std::span<const std::byte> bytes) {
    switch (state_) {
      case State::kHello:
        received_ += bytes.size();
        if (received_ < sizeof(uint32_t)) return;
        if (HelloSize() == 0 || HelloSize() > kHelloBytesMax) return Stranger("no Hello");
        if (HelloBytesWanted() == 0) OnHello();
        return;
      case State::kHeader:
        received_ += bytes.size();
        if (received_ == kHeaderBytes) OnHeader();
        return;
      case State::kPayload:
        crc_ = Crc32c(bytes, crc_);
        received_ += bytes.size();
        owner_->counters_.bytes_received += bytes.size();
        if (received_ == frame_.length) OnPayload();
        return;
      case State::kLeaving:
        return;
    }
  }

  void Stranger(const char* why) {
    LogWarning("transfer: a connection is closed: {}", why);
    Close();
  }

  void OnHello() {
    v1::Hello hello;
    if (!hello.ParseFromArray(hello_.data() + sizeof(uint32_t), static_cast<int>(HelloSize()))) {
      return Stranger("a damaged Hello");
    }
    v1::Hello answer;
    answer.set_protocol_version(kProtocolVersion);
    answer.set_epoch(owner_->epoch_);
    if (hello.protocol_version() != kProtocolVersion) {
      answer.set_refusal(fmt::format("protocol version {} is spoken here", kProtocolVersion));
    } else if (hello.expected_epoch() != owner_->epoch_) {
      answer.set_refusal("the process has restarted: its epoch is another");
    } else if (hello.epoch() == 0) {
      answer.set_refusal("epoch 0");
    }
    peer_epoch_ = hello.epoch();
    answers_ += WithLength(answer.SerializeAsString());
    state_ = answer.refusal().empty() ? State::kHeader : State::kLeaving;
    received_ = 0;
    Flush();
  }

  void OnHeader() {
    const auto frame = DecodeFrame(header_);
    if (!frame.ok()) return Stranger("a damaged frame");
    frame_ = *frame;
    received_ = 0;
    if (frame_.kind == FrameKind::kHeartbeat) {
      return Answer({.kind = FrameKind::kHeartbeatAnswer, .slice = frame_.slice});
    }
    if (frame_.kind != FrameKind::kSlice) return Stranger("an unexpected frame");
    auto admitted =
        owner_->memory_->Admit(peer_epoch_, frame_.ticket, frame_.region, frame_.offset, frame_.length);
    landing_ = admitted.ok() ? *admitted : nullptr;
    crc_ = 0;
    state_ = State::kPayload;
  }

  void OnPayload() {
    const bool admitted = landing_ != nullptr;
    const bool right = crc_ == frame_.payload_crc;
    landing_ = nullptr;
    state_ = State::kHeader;
    received_ = 0;
    if (!admitted || !right) ++owner_->counters_.slices_refused;
    Answer({.kind = FrameKind::kAnswer,
            .code = !admitted ? SliceCode::kRefused
                    : right   ? SliceCode::kLanded
                              : SliceCode::kBadChecksum,
            .slice = frame_.slice});
    // After the answer is queued: a drained ticket's owner may look at the memory at once, and nothing lands
    // after this.
    if (admitted) owner_->memory_->Unpin(frame_.ticket);
  }

  void Answer(const Frame& frame) {
    const HeaderBytes bytes = EncodeFrame(frame);
    answers_.append(reinterpret_cast<const char*>(bytes.data()), bytes.size());
  }

  void Flush() {
    while (!answers_.empty()) {
      size_t written = 0;
      const IoResult result = WriteSome(fd_.get(), std::as_bytes(std::span(answers_)), {}, &written);
      if (result == IoResult::kClosed) return Close();
      answers_.erase(0, written);
      if (result == IoResult::kWouldBlock) break;
    }
    if (answers_.empty() && state_ == State::kLeaving) return Close();
    const uint32_t events =
        (answers_.size() < kAnswerBytesMax ? EPOLLIN : 0U) | (answers_.empty() ? 0U : EPOLLOUT);
    if (events != events_) {
      events_ = events;
      owner_->loop_->Change(fd_.get(), events);
    }
  }

  TcpReceiver* const owner_;
  UniqueFd fd_;
  State state_ = State::kHello;
  TimePoint last_progress_;
  uint32_t events_ = EPOLLIN;
  std::array<std::byte, sizeof(uint32_t) + kHelloBytesMax> hello_{};
  HeaderBytes header_{};
  Frame frame_;
  size_t received_ = 0;           // of the Hello, the header or the payload
  std::byte* landing_ = nullptr;  // where the admitted slice lands; its ticket is pinned while this is set
  uint32_t crc_ = 0;
  std::vector<std::byte> scratch_;
  std::string answers_;
  uint64_t peer_epoch_ = 0;
};

TcpReceiver::TcpReceiver(EventLoop* loop, MemoryTable* memory, uint64_t own_epoch)
    : loop_(loop), memory_(memory), epoch_(own_epoch) {}

TcpReceiver::~TcpReceiver() { CloseAll(); }

Status TcpReceiver::Listen(const HostPort& address, HostPort* bound) {
  MR_ASSIGN_OR_RETURN(UniqueFd fd, ListenTcp(address, bound));
  const int raw = fd.get();
  loop_->Add(raw, EPOLLIN, [this, raw](uint32_t) { Accept(raw); });
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
  for (const UniqueFd& fd : listeners_) loop_->Remove(fd.get());
  listeners_.clear();
  connections_.clear();
}

}  // namespace millrace::transfer
