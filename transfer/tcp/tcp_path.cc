#include "transfer/tcp/tcp_path.h"

#include <sys/epoll.h>

#include <cstring>

#include "base/check.h"
#include "base/digest.h"
#include "base/log.h"
#include "proto/transfer.pb.h"

namespace millrace::transfer {
namespace {

constexpr Duration kConnectTimeout = std::chrono::seconds(2);
constexpr Duration kBackoffMin = std::chrono::milliseconds(10);
constexpr Duration kBackoffMax = std::chrono::seconds(5);
constexpr int32_t kBadChecksumsMax = 8;

TimePoint Now() { return Clock::System().Now(); }

}  // namespace

TcpPath::TcpPath(EventLoop* loop, const Options* options, Target target, PathEvents events)
    : loop_(loop),
      options_(options),
      target_(std::move(target)),
      events_(std::move(events)),
      jitter_(RandomId()) {}

bool TcpPath::HasRoom() const {
  return up() && target_.purpose == Purpose::kData && bytes_in_flight_ < options_->path_bytes_in_flight_max;
}

void TcpPath::Send(Slice slice) {
  MR_CHECK(HasRoom());
  Frame frame;
  frame.kind = FrameKind::kSlice;
  frame.slice = slice.id;
  frame.ticket = slice.ticket;
  frame.region = slice.remote_region;
  frame.offset = slice.remote_offset;
  frame.length = static_cast<uint32_t>(slice.bytes.size());
  frame.payload_crc = Crc32c(slice.bytes);
  const TimePoint now = Now();
  meter_.Sent(now, bytes_in_flight_);
  const bool alone = bytes_in_flight_ == 0;
  bytes_in_flight_ += slice.bytes.size();
  const auto payload = slice.bytes;
  in_flight_[slice.id] = {std::move(slice), now, alone};
  Enqueue(frame, payload);
}

void TcpPath::Enqueue(const Frame& frame, std::span<const std::byte> payload) {
  out_.push_back({EncodeFrame(frame), payload});
  if (!writable_wanted_) Flush();
}

void TcpPath::Connect(TimePoint now) {
  auto fd = ConnectTcp(target_.local_host, target_.remote);
  state_since_ = now;
  if (!fd.ok()) return Fail(fd.status());
  fd_ = *std::move(fd);
  state_ = State::kConnecting;
  writable_wanted_ = true;
  loop_->Add(fd_.get(), EPOLLIN | EPOLLOUT, [this](uint32_t events) { OnReady(events); });
}

void TcpPath::OnReady(uint32_t events) {
  if (state_ == State::kConnecting) {
    if ((events & (EPOLLOUT | EPOLLERR | EPOLLHUP)) == 0) return;
    if (const Status status = SocketError(fd_.get()); !status.ok()) return Fail(status);
    SendHello();
  }
  if (state_ == State::kHello && (events & EPOLLIN) != 0 && !ReadHello()) return;
  if (state_ == State::kUp && (events & EPOLLIN) != 0) ReadFrames();
  if (state_ == State::kUp && (events & EPOLLOUT) != 0) Flush();
  if (fd_.valid() && (events & (EPOLLERR | EPOLLHUP)) != 0 && (events & EPOLLIN) == 0)
    Fail(Unavailable("connection closed"));
}

void TcpPath::SendHello() {
  v1::Hello hello;
  hello.set_protocol_version(kProtocolVersion);
  hello.set_epoch(target_.own_epoch);
  hello.set_expected_epoch(target_.expected_epoch);
  hello.set_purpose(target_.purpose == Purpose::kControl ? v1::Hello::CONTROL : v1::Hello::DATA);
  const std::string message = WithLength(hello.SerializeAsString());
  size_t written = 0;
  // A fresh connection's buffer holds a Hello; one that does not is broken.
  if (WriteSome(fd_.get(), std::as_bytes(std::span(message)), {}, &written) != IoResult::kDone ||
      written != message.size()) {
    return Fail(Unavailable("the connection broke at once"));
  }
  state_ = State::kHello;
  writable_wanted_ = false;
  loop_->Change(fd_.get(), EPOLLIN);
}

bool TcpPath::ReadHello() {
  uint32_t size = 0;
  while (true) {
    if (hello_in_.size() >= sizeof(size)) {
      std::memcpy(&size, hello_in_.data(), sizeof(size));
      if (size > kHelloBytesMax) {
        Fail(DataLoss("not a transfer engine"));
        return false;
      }
      if (hello_in_.size() == sizeof(size) + size) break;
    }
    const size_t wanted = hello_in_.size() < sizeof(size) ? sizeof(size) - hello_in_.size()
                                                          : sizeof(size) + size - hello_in_.size();
    std::string chunk(wanted, '\0');
    size_t got = 0;
    const IoResult result = ReadSome(fd_.get(), std::as_writable_bytes(std::span(chunk)), &got);
    if (result == IoResult::kClosed) Fail(Unavailable("connection closed"));
    if (result != IoResult::kDone) return false;
    hello_in_.append(chunk, 0, got);
  }
  v1::Hello hello;
  if (!hello.ParseFromArray(hello_in_.data() + sizeof(size), static_cast<int>(size)) ||
      hello.protocol_version() != kProtocolVersion || hello.epoch() != target_.expected_epoch ||
      !hello.refusal().empty()) {
    const Status status =
        Unavailable("{} is not the process that was looked for: {}", target_.remote.ToString(),
                    hello.refusal().empty() ? "another epoch or protocol" : hello.refusal());
    Fail(status);
    events_.refused(status);
    return false;
  }
  if (logged_down_) LogInfo("transfer: path to {} is up again", target_.remote.ToString());
  logged_down_ = false;
  state_ = State::kUp;
  backoff_ = Duration::zero();
  last_heard_ = last_beat_ = Now();
  events_.has_room();
  return true;
}

void TcpPath::ReadFrames() {
  while (state_ == State::kUp) {
    size_t got = 0;
    const IoResult result = ReadSome(fd_.get(), std::span(header_in_).subspan(header_in_size_), &got);
    if (result == IoResult::kWouldBlock) return;
    if (result == IoResult::kClosed) return Fail(Unavailable("connection closed by the peer"));
    header_in_size_ += got;
    last_heard_ = Now();
    if (header_in_size_ < kHeaderBytes) continue;
    header_in_size_ = 0;
    const auto frame = DecodeFrame(header_in_);
    if (!frame.ok()) return Fail(frame.status());
    OnFrame(*frame);
  }
}

void TcpPath::OnFrame(const Frame& frame) {
  if (frame.kind == FrameKind::kAnswer) return OnAnswer(frame);
  if (frame.kind != FrameKind::kHeartbeatAnswer) Fail(DataLoss("an unexpected frame"));
}

void TcpPath::OnAnswer(const Frame& frame) {
  const auto found = in_flight_.find(frame.slice);
  if (found == in_flight_.end()) return Fail(DataLoss("an answer to a slice that is not in flight"));
  const InFlight done = std::move(found->second);
  in_flight_.erase(found);
  bytes_in_flight_ -= done.slice.bytes.size();
  switch (frame.code) {
    case SliceCode::kLanded:
      bad_checksums_ = 0;
      meter_.Landed(Now(), done.sent, done.slice.bytes.size(), done.alone, bytes_in_flight_);
      events_.slice_done(done.slice, SliceOutcome::kLanded);
      break;
    case SliceCode::kRefused:
      events_.slice_done(done.slice, SliceOutcome::kRefused);
      break;
    case SliceCode::kBadChecksum:
      ++slices_resent_;
      events_.slice_done(done.slice, SliceOutcome::kBadChecksum);
      if (++bad_checksums_ >= kBadChecksumsMax)
        return Fail(DataLoss("{} wrong checksums in a row", bad_checksums_));
      break;
  }
  events_.has_room();
}

void TcpPath::Flush() {
  while (!out_.empty()) {
    const Outgoing& front = out_.front();
    const size_t total = kHeaderBytes + front.payload.size();
    const auto header = std::span<const std::byte>(front.header).subspan(std::min(out_offset_, kHeaderBytes));
    const auto payload = front.payload.subspan(out_offset_ > kHeaderBytes ? out_offset_ - kHeaderBytes : 0);
    size_t written = 0;
    const IoResult result = WriteSome(fd_.get(), header, payload, &written);
    if (result == IoResult::kClosed) return Fail(Unavailable("connection closed while sending"));
    out_offset_ += written;
    if (out_offset_ == total) {
      out_.pop_front();
      out_offset_ = 0;
      continue;
    }
    if (result == IoResult::kWouldBlock) break;
  }
  const bool wanted = !out_.empty();
  if (wanted != writable_wanted_) {
    writable_wanted_ = wanted;
    loop_->Change(fd_.get(), wanted ? EPOLLIN | EPOLLOUT : EPOLLIN);
  }
}

void TcpPath::DropConnection() {
  if (fd_.valid()) loop_->Remove(fd_.get());
  fd_.Reset();
  hello_in_.clear();
  header_in_size_ = 0;
  out_.clear();
  out_offset_ = 0;
  writable_wanted_ = false;
  bad_checksums_ = 0;
  meter_.Interrupted();
  bytes_in_flight_ = 0;
  // With the socket closed, nothing reads these slices' memory any more.
  const auto lost = std::exchange(in_flight_, {});
  slices_resent_ += lost.size();
  for (const auto& [id, entry] : lost) events_.slice_done(entry.slice, SliceOutcome::kPathFailed);
}

void TcpPath::Fail(const Status& status) {
  if (state_ == State::kClosed) return;
  const bool was_up = state_ == State::kUp;
  state_ = State::kDown;
  if (was_up && !logged_down_) {
    LogWarning("transfer: path to {} is down: {}", target_.remote.ToString(), Message(status));
    logged_down_ = true;
  }
  backoff_ = std::min(kBackoffMax, std::max(kBackoffMin, backoff_ * 2));
  // Jitter, so that many peers of a restarted host do not knock at once.
  retry_at_ = Now() + backoff_ / 2 +
              Duration(static_cast<int64_t>(jitter_.Uniform() * static_cast<double>(backoff_.count()) / 2));
  DropConnection();
}

void TcpPath::Close() {
  if (state_ == State::kClosed) return;
  state_ = State::kClosed;
  DropConnection();
}

TimePoint TcpPath::Tick(TimePoint now) {
  switch (state_) {
    case State::kClosed:
      return kNoDeadline;
    case State::kDown:
      if (now >= retry_at_) Connect(now);
      return state_ == State::kDown ? retry_at_ : now + kConnectTimeout;
    case State::kConnecting:
    case State::kHello:
      if (now - state_since_ > kConnectTimeout) Fail(Unavailable("no answer"));
      return state_ == State::kDown ? retry_at_
                                    : state_since_ + kConnectTimeout + std::chrono::milliseconds(1);
    case State::kUp:
      break;
  }
  TimePoint next = kNoDeadline;
  if (!in_flight_.empty()) {
    TimePoint oldest = kNoDeadline;
    for (const auto& [id, entry] : in_flight_) oldest = std::min(oldest, entry.sent);
    const TimePoint overdue = std::max(oldest, last_heard_) + options_->slice_timeout;
    if (now >= overdue) {
      Fail(DeadlineExceeded("slices are not answered"));
      return retry_at_;
    }
    next = overdue;
  }
  if (target_.purpose == Purpose::kControl) {
    if (now - last_heard_ > options_->peer_timeout) {
      Fail(DeadlineExceeded("no heartbeat is answered"));
      return retry_at_;
    }
    if (now - last_beat_ >= options_->heartbeat) {
      last_beat_ = now;
      Enqueue({.kind = FrameKind::kHeartbeat}, {});
      if (state_ != State::kUp) return retry_at_;
    }
    next = std::min(next, last_beat_ + options_->heartbeat);
  }
  return next;
}

PathSnapshot TcpPath::Describe() const {
  static constexpr const char* kNames[] = {"down", "connecting", "connecting", "up", "down"};
  PathSnapshot snapshot;
  snapshot.local_rail = target_.local_host.empty() ? "any" : target_.local_host;
  snapshot.remote_rail = target_.remote.ToString();
  snapshot.state = kNames[static_cast<int>(state_)];
  snapshot.slices_resent = slices_resent_;
  snapshot.bytes_in_flight = bytes_in_flight_;
  meter_.Fill(&snapshot);
  return snapshot;
}

}  // namespace millrace::transfer
