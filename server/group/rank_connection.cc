#include "server/group/rank_connection.h"

#include <sys/socket.h>

#include <algorithm>
#include <boost/asio/buffer.hpp>
#include <boost/asio/error.hpp>
#include <boost/asio/post.hpp>
#include <cerrno>
#include <cstring>
#include <utility>

namespace millrace::server {
namespace {

// The largest there is: loads and targets of a model with 100 layers of 256 experts.
constexpr uint32_t kMessageBytesMax = 1 << 20;
constexpr size_t kReadBytes = 64 << 10;
constexpr int kSendBuffer = 2 << 20;

bool IsOfPeer(const boost::system::error_code& error) {
  return error == boost::asio::error::eof || error == boost::asio::error::connection_reset ||
         error == boost::asio::error::broken_pipe;
}

}  // namespace

RankConnection::RankConnection(boost::asio::ip::tcp::socket socket) : socket_(std::move(socket)) {
  boost::system::error_code ignored;
  socket_.set_option(boost::asio::ip::tcp::no_delay(true), ignored);
  socket_.set_option(boost::asio::socket_base::send_buffer_size(kSendBuffer), ignored);
}

std::string RankConnection::Frame(const group::GroupMessage& message) {
  const auto length = static_cast<uint32_t>(message.ByteSizeLong());
  std::string frame(sizeof(length) + length, '\0');
  std::memcpy(frame.data(), &length, sizeof(length));
  message.SerializeToArray(frame.data() + sizeof(length), static_cast<int>(length));
  return frame;
}

void RankConnection::Start(OnMessage on_message, OnClosed on_closed) {
  on_message_ = std::move(on_message);
  on_closed_ = std::move(on_closed);
  Read();
}

void RankConnection::Read() {
  const size_t had = input_.size();
  input_.resize(had + kReadBytes);
  socket_.async_read_some(
      boost::asio::buffer(input_.data() + had, kReadBytes),
      [this, self = shared_from_this(), had](const boost::system::error_code& error, size_t count) {
        input_.resize(had + count);
        if (!error && TakeMessages()) return Read();
        End(error ? error.message() : "a message that is none", !error || IsOfPeer(error));
        bool by_peer = false;
        {
          const std::lock_guard lock(mutex_);
          by_peer = by_peer_;
          boost::system::error_code ignored;
          socket_.close(ignored);
        }
        on_message_ = nullptr;
        std::exchange(on_closed_, nullptr)(why_, by_peer);
      });
}

// False: what came is not what a rank sends.
bool RankConnection::TakeMessages() {
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

void RankConnection::Send(const std::string& frame) {
  const std::lock_guard lock(mutex_);
  if (!open_) return;
  if (!output_.empty()) {
    output_ += frame;
    return;
  }
  Write(frame.data(), frame.size());
  if (!output_.empty())
    boost::asio::post(socket_.get_executor(), [self = shared_from_this()] { self->WriteOn(); });
}

// With mutex_. What is left of these bytes is in output_ then.
void RankConnection::Write(const char* bytes, size_t count) {
  const ssize_t sent = send(socket_.native_handle(), bytes, count, MSG_DONTWAIT | MSG_NOSIGNAL);
  if (sent < 0 && errno != EAGAIN)
    return EndLocked(std::strerror(errno), errno == EPIPE || errno == ECONNRESET);
  const auto written = static_cast<size_t>(std::max<ssize_t>(sent, 0));
  output_ = std::string(bytes + written, count - written);
}

void RankConnection::WriteOn() {
  socket_.async_wait(boost::asio::ip::tcp::socket::wait_write,
                     [self = shared_from_this()](const boost::system::error_code& error) {
                       if (error) return;
                       const std::lock_guard lock(self->mutex_);
                       if (!self->open_) return;
                       const std::string output = std::move(self->output_);
                       self->Write(output.data(), output.size());
                       if (self->open_ && !self->output_.empty()) self->WriteOn();
                     });
}

void RankConnection::End(const std::string& why, bool by_peer) {
  const std::lock_guard lock(mutex_);
  if (open_) EndLocked(why, by_peer);
}

void RankConnection::EndLocked(const std::string& why, bool by_peer) {
  open_ = false;
  output_.clear();
  why_ = why;
  by_peer_ = by_peer;
  shutdown(socket_.native_handle(), SHUT_RDWR);  // ends the read
}

}  // namespace millrace::server
