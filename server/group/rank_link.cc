#include "server/group/rank_link.h"

#include <sys/socket.h>

#include <boost/asio/buffer.hpp>
#include <cerrno>
#include <cstring>
#include <utility>

namespace millrace::server {
namespace {

// The largest there is: loads and targets of a model with 100 layers of 256 experts.
constexpr uint32_t kMessageBytesMax = 1 << 20;
constexpr size_t kReadBytes = 64 << 10;
constexpr int kSendBuffer = 2 << 20;

}  // namespace

RankLink::RankLink(boost::asio::ip::tcp::socket socket) : socket_(std::move(socket)) {
  boost::system::error_code ignored;
  socket_.set_option(boost::asio::ip::tcp::no_delay(true), ignored);
  socket_.set_option(boost::asio::socket_base::send_buffer_size(kSendBuffer), ignored);
}

void RankLink::Start(OnMessage on_message, OnClosed on_closed) {
  on_message_ = std::move(on_message);
  on_closed_ = std::move(on_closed);
  Read();
}

void RankLink::Read() {
  const size_t had = input_.size();
  input_.resize(had + kReadBytes);
  socket_.async_read_some(
      boost::asio::buffer(input_.data() + had, kReadBytes),
      [this, self = shared_from_this(), had](const boost::system::error_code& error, size_t count) {
        input_.resize(had + count);
        if (!error && TakeMessages()) return Read();
        Close(error ? error.message() : "a message that is none");
        {
          const std::lock_guard lock(mutex_);
          boost::system::error_code ignored;
          socket_.close(ignored);
        }
        on_message_ = nullptr;
        std::exchange(on_closed_, nullptr)(why_);
      });
}

// False: what came is not what a rank sends.
bool RankLink::TakeMessages() {
  size_t begin = 0;
  while (input_.size() - begin >= sizeof(uint32_t)) {
    uint32_t length = 0;
    std::memcpy(&length, input_.data() + begin, sizeof(length));
    if (length > kMessageBytesMax) return false;
    if (input_.size() - begin - sizeof(length) < length) break;
    group::GroupMessage message;
    if (!message.ParseFromArray(input_.data() + begin + sizeof(length), static_cast<int>(length)))
      return false;
    begin += sizeof(length) + length;
    on_message_(message);
  }
  input_.erase(0, begin);
  return true;
}

void RankLink::Send(const group::GroupMessage& message) {
  const std::lock_guard lock(mutex_);
  if (!open_) return;
  const auto length = static_cast<uint32_t>(message.ByteSizeLong());
  frame_.resize(sizeof(length) + length);
  std::memcpy(frame_.data(), &length, sizeof(length));
  message.SerializeToArray(frame_.data() + sizeof(length), static_cast<int>(length));
  const ssize_t sent =
      send(socket_.native_handle(), frame_.data(), frame_.size(), MSG_DONTWAIT | MSG_NOSIGNAL);
  if (sent == static_cast<ssize_t>(frame_.size())) return;
  open_ = false;
  why_ = sent >= 0 || errno == EAGAIN ? "it does not read what it is sent" : std::strerror(errno);
  shutdown(socket_.native_handle(), SHUT_RDWR);  // ends the read
}

void RankLink::Close(const std::string& why) {
  const std::lock_guard lock(mutex_);
  if (!open_) return;
  open_ = false;
  why_ = why;
  shutdown(socket_.native_handle(), SHUT_RDWR);
}

}  // namespace millrace::server
