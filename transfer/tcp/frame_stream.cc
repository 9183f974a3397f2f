#include "transfer/tcp/frame_stream.h"

#include <sys/epoll.h>
#include <sys/socket.h>
#include <sys/uio.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

#include "base/check.h"
#include "base/digest.h"

namespace millrace::transfer {
namespace {

constexpr size_t kBufferBytes = 16 << 10;
constexpr uint32_t kBulkBytes =
    16 << 10;  // frames from this size on are read into place from their first byte
// Per round of the loop, so that bulk does not keep small frames of other connections waiting.
constexpr size_t kReadBudget = 128 << 10;
constexpr size_t kSendBudget = 128 << 10;
constexpr size_t kQueuedBytesMax = 1 << 20;  // a peer that takes no answers is read no further
constexpr size_t kPartsMax = 16;

}  // namespace

FrameStream::FrameStream(EventLoop* loop, UniqueFd fd, bool connecting, Handler* handler)
    : loop_(loop),
      handler_(handler),
      fd_(std::move(fd)),
      state_(connecting ? State::kConnecting : State::kHello),
      buffer_(kBufferBytes) {
  events_ = connecting ? EPOLLIN | EPOLLOUT : EPOLLIN;
  loop_->Add(fd_.get(), events_, [this](uint32_t events) { OnReady(events); });
}

void FrameStream::Close() {
  if (closed()) return;
  loop_->Remove(fd_.get());
  fd_.Reset();
  out_.clear();
  bytes_queued_ = out_offset_ = 0;
  target_ = nullptr;
}

void FrameStream::Fail(const Status& why) {
  if (closed()) return;
  Close();
  handler_->OnClosed(why);
}

void FrameStream::OnReady(uint32_t events) {
  if (state_ == State::kConnecting) {
    if ((events & (EPOLLOUT | EPOLLERR | EPOLLHUP)) == 0) return;
    if (const Status status = SocketError(fd_.get()); !status.ok()) return Fail(status);
    state_ = State::kHello;
    handler_->OnConnected();
  }
  if (!closed() && (events & EPOLLOUT) != 0) Flush();
  if (!closed() && (events & (EPOLLIN | EPOLLHUP | EPOLLERR)) != 0) Read();
}

void FrameStream::Read() {
  size_t budget = kReadBudget;
  reading_ = true;  // answers wait for the end of the round
  while (!closed() && !leaving_ && budget > 0 && bytes_queued_ < kQueuedBytesMax && ReadOnce(&budget)) {
  }
  reading_ = false;
  if (!closed()) Flush();
}

// One system call and what follows from it. False: no more for now.
bool FrameStream::ReadOnce(size_t* budget) {
  if (begin_ == end_) begin_ = end_ = 0;
  iovec parts[2];
  size_t count = 0;
  size_t direct = 0;
  if (state_ == State::kPayload && target_ != nullptr) {
    direct = frame_.length - received_;
    parts[count++] = {target_ + received_, direct};
  }
  // Behind bulk, or before it, no more than a header is read ahead.
  const bool bulk =
      state_ != State::kHello && (state_ == State::kPayload ? frame_.length : last_length_) >= kBulkBytes;
  const bool dropped = state_ == State::kPayload && target_ == nullptr;
  const size_t ahead =
      std::min(buffer_.size() - end_, bulk && !dropped ? kHeaderBytes - (end_ - begin_) : kBufferBytes);
  parts[count++] = {buffer_.data() + end_, ahead};
  msghdr message{};
  message.msg_iov = parts;
  message.msg_iovlen = count;
  const ssize_t got = recvmsg(fd_.get(), &message, 0);
  if (got < 0 && errno == EINTR) return true;
  if (got < 0 && (errno == EAGAIN || errno == EWOULDBLOCK)) return false;
  if (got <= 0) {
    Fail(Unavailable("connection closed by the peer"));
    return false;
  }
  const auto bytes = static_cast<size_t>(got);
  *budget -= std::min(*budget, bytes);
  const size_t placed = std::min(direct, bytes);
  if (placed > 0) {
    crc_ = Crc32c({target_ + received_, placed}, crc_);
    received_ += static_cast<uint32_t>(placed);
    handler_->OnProgress(placed);
    if (received_ == frame_.length) EndPayload();
  }
  end_ += bytes - placed;
  while (!closed() && !leaving_ && begin_ < end_) {
    const size_t taken = Consume(std::span(buffer_).subspan(begin_, end_ - begin_));
    if (taken == 0) break;
    begin_ += taken;
  }
  if (closed()) return false;
  if (begin_ > 0 && begin_ < end_) {
    std::memmove(buffer_.data(), buffer_.data() + begin_, end_ - begin_);
    end_ -= begin_;
    begin_ = 0;
  }
  // Less than there was room for: the socket is empty.
  return bytes == direct + ahead;
}

size_t FrameStream::Consume(std::span<const std::byte> bytes) {
  switch (state_) {
    case State::kConnecting:
      return 0;
    case State::kHello: {
      uint32_t size = 0;
      if (bytes.size() < sizeof(size)) return 0;
      std::memcpy(&size, bytes.data(), sizeof(size));
      if (size == 0 || size > kHelloBytesMax) {
        Fail(DataLoss("not a transfer engine"));
        return 0;
      }
      if (bytes.size() < sizeof(size) + size) return 0;
      const std::string text(reinterpret_cast<const char*>(bytes.data()) + sizeof(size), size);
      state_ = State::kHeader;
      if (!handler_->OnHello(text)) leaving_ = true;
      return sizeof(size) + size;
    }
    case State::kHeader: {
      if (bytes.size() < kHeaderBytes) return 0;
      HeaderBytes header;
      std::memcpy(header.data(), bytes.data(), kHeaderBytes);
      const auto frame = DecodeFrame(header);
      if (!frame.ok()) {
        Fail(frame.status());
        return 0;
      }
      frame_ = *frame;
      BeginPayload();
      return kHeaderBytes;
    }
    case State::kPayload:
      break;
  }
  const auto taken = std::min<size_t>(bytes.size(), frame_.length - received_);
  if (target_ != nullptr) std::memcpy(target_ + received_, bytes.data(), taken);
  crc_ = Crc32c(bytes.first(taken), crc_);
  received_ += static_cast<uint32_t>(taken);
  handler_->OnProgress(taken);
  if (received_ == frame_.length) EndPayload();
  return taken;
}

void FrameStream::BeginPayload() {
  last_length_ = HasPayload(frame_.kind) ? frame_.length : 0;
  received_ = 0;
  crc_ = 0;
  if (frame_.kind == FrameKind::kControl) {
    message_.resize(frame_.length);
    target_ = reinterpret_cast<std::byte*>(message_.data());
  } else {
    target_ = handler_->OnHeader(frame_);
    if (closed()) return;
  }
  state_ = State::kPayload;
  if (last_length_ == 0) EndPayload();
}

void FrameStream::EndPayload() {
  state_ = State::kHeader;
  target_ = nullptr;
  const bool right = crc_ == frame_.payload_crc;
  if (frame_.kind != FrameKind::kControl) return handler_->OnFrame(frame_, right || !HasPayload(frame_.kind));
  if (!right) return Fail(DataLoss("a damaged control message"));
  handler_->OnMessage(message_);
}

void FrameStream::SendHello(const std::string& message) {
  Outgoing out;
  out.text = WithLength(message);
  bytes_queued_ += out.text.size();
  out_.push_back(std::move(out));
  if (!reading_) Flush();
}

void FrameStream::Send(const Frame& frame, std::span<const std::byte> payload) {
  Outgoing out;
  out.frame = frame;
  out.payload = payload;
  bytes_queued_ += kHeaderBytes;  // payload does not take memory here
  out_.push_back(std::move(out));
  if (!reading_) Flush();
}

void FrameStream::SendMessage(const std::string& body) {
  const Frame frame{.kind = FrameKind::kControl,
                    .length = static_cast<uint32_t>(body.size()),
                    .payload_crc = Crc32c(AsBytes(body))};
  const HeaderBytes header = EncodeFrame(frame);
  Outgoing out;
  out.text.assign(reinterpret_cast<const char*>(header.data()), header.size());
  out.text += body;
  bytes_queued_ += out.text.size();
  out_.push_back(std::move(out));
  if (!reading_) Flush();
}

void FrameStream::Flush() {
  if (closed() || state_ == State::kConnecting) return;
  size_t budget = kSendBudget;
  while (!out_.empty() && budget > 0) {
    iovec parts[kPartsMax];
    size_t count = 0, offered = 0, skip = out_offset_;
    const auto add = [&](const void* data, size_t size) {
      const size_t gone = std::min(skip, size);
      skip -= gone;
      const size_t part = std::min(size - gone, budget - offered);
      if (part == 0 || count == kPartsMax) return;
      parts[count++] = {const_cast<char*>(static_cast<const char*>(data)) + gone, part};
      offered += part;
    };
    for (auto it = out_.begin(); it != out_.end() && count + 2 <= kPartsMax && offered < budget; ++it) {
      if (!it->text.empty()) {
        add(it->text.data(), it->text.size());
      } else {
        if (!it->ready) {
          if (!it->payload.empty()) it->frame.payload_crc = Crc32c(it->payload);
          it->header = EncodeFrame(it->frame);
          it->ready = true;
        }
        add(it->header.data(), kHeaderBytes);
        add(it->payload.data(), it->payload.size());
      }
    }
    msghdr message{};
    message.msg_iov = parts;
    message.msg_iovlen = count;
    const ssize_t put = sendmsg(fd_.get(), &message, MSG_NOSIGNAL);
    if (put < 0 && errno == EINTR) continue;
    if (put < 0 && errno != EAGAIN && errno != EWOULDBLOCK)
      return Fail(Unavailable("connection closed while sending: {}", std::strerror(errno)));
    const size_t written = put < 0 ? 0 : static_cast<size_t>(put);
    budget -= written;
    out_offset_ += written;
    while (!out_.empty()) {
      Outgoing& front = out_.front();
      const size_t own = front.text.empty() ? kHeaderBytes : front.text.size();
      if (out_offset_ < own + front.payload.size()) break;
      out_offset_ -= own + front.payload.size();
      bytes_queued_ -= own;
      const Frame frame = front.frame;
      const bool payload = !front.payload.empty();
      out_.pop_front();
      if (payload) handler_->OnSent(frame);
      if (closed()) return;
    }
    if (written < offered) break;
  }
  if (out_.empty() && leaving_) return Fail(Unavailable("closed after a refusal"));
  WantEvents();
}

void FrameStream::WantEvents() {
  const uint32_t wanted =
      (bytes_queued_ < kQueuedBytesMax && !leaving_ ? EPOLLIN : 0U) | (out_.empty() ? 0U : EPOLLOUT);
  if (wanted == events_) return;
  events_ = wanted;
  loop_->Change(fd_.get(), wanted);
}

}  // namespace millrace::transfer
