#include "server/gateway/http_connection.h"

#include <poll.h>
#include <sys/socket.h>

#include <boost/asio/as_tuple.hpp>
#include <boost/asio/co_spawn.hpp>
#include <boost/asio/detached.hpp>
#include <boost/asio/steady_timer.hpp>
#include <boost/asio/use_awaitable.hpp>
#include <boost/asio/write.hpp>
#include <boost/beast/http.hpp>
#include <chrono>

#include "base/random.h"
#include "server/gateway/api_request.h"

namespace millrace::server {
namespace {

namespace net = boost::asio;
namespace beast = boost::beast;
namespace http = beast::http;
using beast::error_code;

constexpr size_t kReadBytes = 16 << 10;
constexpr auto kLingerTime = std::chrono::seconds(2);
constexpr auto kHangupPoll = std::chrono::milliseconds(100);
constexpr auto kToken = net::as_tuple(net::use_awaitable);

std::chrono::steady_clock::duration Steady(Duration duration) {
  return std::chrono::duration_cast<std::chrono::steady_clock::duration>(duration);
}

std::string RequestId(const HttpRequest& request) {
  const auto value = request["x-request-id"];
  const std::string_view text(value.data(), value.size());
  return IsRequestId(text) ? std::string(text) : RandomName("req-");
}

// Ends the reads of a stream after a while. The stream's own limit would close the socket before the client
// can be told.
class ReadLimit {
 public:
  ReadLimit(beast::tcp_stream& stream, Duration limit)
      : state_(std::make_shared<State>(State{&stream, false})), timer_(stream.get_executor(), Steady(limit)) {
    timer_.async_wait([state = state_](error_code error) {
      if (error || state->stream == nullptr) return;
      state->expired = true;
      state->stream->cancel();
    });
  }
  ~ReadLimit() { state_->stream = nullptr; }
  bool expired() const { return state_->expired; }

 private:
  struct State {
    beast::tcp_stream* stream;
    bool expired;
  };
  const std::shared_ptr<State> state_;  // shared with the timer's handler, which may run after this has gone
  net::steady_timer timer_;
};

// The other side has closed, although bytes from it may still be unread.
bool HungUp(int socket) {
  pollfd poll_fd{socket, POLLRDHUP, 0};
  return poll(&poll_fd, 1, 0) > 0 && (poll_fd.revents & (POLLRDHUP | POLLHUP | POLLERR)) != 0;
}

}  // namespace

HttpConnection::HttpConnection(beast::tcp_stream tcp, std::shared_ptr<net::ssl::context> tls,
                               const GatewayOptions& options)
    : stream_(std::move(tcp), std::move(tls)), options_(options) {}

net::awaitable<bool> HttpConnection::Handshake() {
  if (stream_.tls() == nullptr) co_return true;
  stream_.tcp().expires_after(Steady(options_.header_timeout));
  auto [error] = co_await stream_.tls()->async_handshake(net::ssl::stream_base::server, kToken);
  co_return !error;
}

net::awaitable<HttpConnection::ReadOutcome> HttpConnection::Read(const Gate& gate) {
  http::request_parser<http::string_body> parser;
  parser.header_limit(options_.header_bytes_max);
  parser.body_limit(options_.body_bytes_max);
  stream_.tcp().expires_after(Steady(options_.idle_timeout));
  if (buffer_.size() == 0) {
    // Wait for the first bytes with the idle limit; from then on the request has its own. A read of the
    // stream, because the stream's limit does not hold for waits on its socket.
    auto [wait_error, bytes] = co_await stream_.async_read_some(buffer_.prepare(kReadBytes), kToken);
    if (wait_error) {
      keep_alive_ = false;
      co_return ReadOutcome::kClosed;
    }
    buffer_.commit(bytes);
  }
  const ReadLimit limit(stream_.tcp(), options_.header_timeout);
  // For when the limit met no read to end.
  stream_.tcp().expires_after(2 * Steady(options_.header_timeout));
  auto [header_error, header_bytes] = co_await http::async_read_header(stream_, buffer_, parser, kToken);
  (void)header_bytes;
  error_code error = header_error;
  TakeHeader(parser.get());
  if (!error && !limit.expired()) {
    if (auto refused = gate(parser.get(), path_)) {
      refusal_ = *std::move(refused);
      // Only a body that is on its way makes the connection useless.
      const bool body_follows = parser.chunked() || parser.content_length().value_or(0) > 0;
      keep_alive_ = keep_alive_ && !body_follows;
      linger_ = body_follows;
      request_ = parser.release();
      co_return ReadOutcome::kRefused;
    }
  }
  if (!error && parser.get()[http::field::expect] == "100-continue") {
    http::response<http::empty_body> go_on(http::status::continue_, 11);
    auto [write_error, write_bytes] = co_await http::async_write(stream_, go_on, kToken);
    (void)write_bytes;
    error = write_error;
  }
  if (!error && !limit.expired()) {
    auto [body_error, body_bytes] = co_await http::async_read(stream_, buffer_, parser, kToken);
    (void)body_bytes;
    error = body_error;
  }
  request_ = parser.release();
  // An answer may take minutes and a kept connection longer: neither needs the room that reading took.
  buffer_.shrink_to_fit();
  if (!error && !limit.expired()) co_return ReadOutcome::kRequest;
  keep_alive_ = false;
  linger_ = ClassifyReadError(error, limit.expired());
  co_return linger_ ? ReadOutcome::kRefused : ReadOutcome::kClosed;
}

void HttpConnection::TakeHeader(const HttpRequest& header) {
  request_id_ = RequestId(header);
  path_ = std::string(header.target().substr(0, header.target().find('?')));
  keep_alive_ = header.keep_alive();
  answer_headers_.clear();
}

// Fills `refusal_`; false when the connection is gone and nobody can be answered.
bool HttpConnection::ClassifyReadError(error_code error, bool timed_out) {
  refusal_ = BadRequest("", error.message());
  if (error == http::error::body_limit) {
    refusal_.http_status = 413;
    refusal_.code = "request_too_large";
    refusal_.message = fmt::format("the body is larger than {} bytes", options_.body_bytes_max);
  } else if (error == http::error::header_limit) {
    refusal_.http_status = 431;
    refusal_.code = "headers_too_large";
    refusal_.message = fmt::format("the headers are larger than {} bytes", options_.header_bytes_max);
  } else if (timed_out) {
    refusal_.http_status = 408;
    refusal_.code = "request_timeout";
    refusal_.message = "the request did not arrive in time";
  } else if (error.category() != http::make_error_code(http::error::bad_method).category() ||
             error == http::error::end_of_stream || error == http::error::partial_message) {
    return false;
  }
  return true;
}

void HttpConnection::LimitWrite() { stream_.tcp().expires_after(Steady(options_.write_timeout)); }

net::awaitable<void> HttpConnection::Write(HttpResponse response) {
  response.version(11);
  response.set("x-request-id", request_id_);
  for (const auto& [name, value] : answer_headers_) response.set(name, value);
  response.keep_alive(keep_alive_);
  response.prepare_payload();
  if (request_.method() == http::verb::head) response.body().clear();
  LimitWrite();
  auto [error, bytes] = co_await http::async_write(stream_, response, kToken);
  (void)bytes;
  if (error) keep_alive_ = false;
}

net::awaitable<bool> HttpConnection::BeginStream(HttpResponse response) {
  http::response<http::empty_body> header(std::move(response.base()));
  header.version(11);
  header.set("x-request-id", request_id_);
  for (const auto& [name, value] : answer_headers_) header.set(name, value);
  header.keep_alive(keep_alive_);
  header.chunked(true);
  http::response_serializer<http::empty_body> serializer(header);
  LimitWrite();
  auto [error, bytes] = co_await http::async_write_header(stream_, serializer, kToken);
  (void)bytes;
  stream_.tcp().expires_never();
  if (error) keep_alive_ = false;
  co_return !error;
}

net::awaitable<bool> HttpConnection::WriteChunk(std::string data) {
  LimitWrite();
  auto [error, bytes] = co_await net::async_write(stream_, http::make_chunk(net::buffer(data)), kToken);
  (void)bytes;
  stream_.tcp().expires_never();
  if (error) keep_alive_ = false;
  co_return !error;
}

net::awaitable<void> HttpConnection::EndStream() {
  LimitWrite();
  auto [error, bytes] = co_await net::async_write(stream_, http::make_chunk_last(), kToken);
  (void)bytes;
  if (error) keep_alive_ = false;
}

// While an answer is being made nobody reads the socket, so a client that leaves would go unnoticed. A closed
// peer makes the socket readable with nothing to read; bytes to read are the next request, which is left
// alone. Under TLS they may also be the goodbye of a client that closes next.
void HttpConnection::WatchPeer(std::function<void()> on_gone) {
  watch_ = std::make_shared<Watch>();
  stream_.tcp().expires_never();
  net::co_spawn(stream_.get_executor(), RunWatch(watch_, std::move(on_gone)), net::detached);
}

net::awaitable<void> HttpConnection::RunWatch(std::shared_ptr<Watch> watch, std::function<void()> on_gone) {
  auto& socket = stream_.tcp().socket();
  auto [error] = co_await socket.async_wait(net::ip::tcp::socket::wait_read, kToken);
  char byte = 0;
  if (!error && recv(socket.native_handle(), &byte, 1, MSG_PEEK | MSG_DONTWAIT) <= 0) watch->gone = true;
  while (!error && !watch->gone && !watch->stopping && stream_.tls() != nullptr) {
    watch->gone = HungUp(socket.native_handle());
    if (watch->gone) break;
    net::steady_timer pause(stream_.get_executor(), kHangupPoll);
    co_await pause.async_wait(kToken);
  }
  if (watch->gone) on_gone();
  watch->stopped = true;
}

net::awaitable<void> HttpConnection::StopWatching() {
  // The coroutine uses this connection: wait until it has let go.
  error_code ignored;
  watch_->stopping = true;
  while (!watch_->stopped) {
    stream_.tcp().socket().cancel(ignored);
    net::steady_timer turn(stream_.get_executor(),
                           std::chrono::milliseconds(stream_.tls() != nullptr ? 5 : 0));
    co_await turn.async_wait(kToken);
  }
}

// Closing a socket that holds unread bytes resets the connection, and the client may lose the answer that is
// on its way. So what a refused client still sends is read and dropped, for a short while.
net::awaitable<void> HttpConnection::Close() {
  stream_.tcp().expires_after(kLingerTime);
  if (stream_.tls() != nullptr) {
    co_await stream_.tls()->async_shutdown(kToken);
  }
  error_code ignored;
  stream_.tcp().socket().shutdown(net::ip::tcp::socket::shutdown_send, ignored);
  while (linger_) {
    buffer_.clear();
    auto [error, bytes] = co_await stream_.async_read_some(buffer_.prepare(kReadBytes), kToken);
    (void)bytes;
    if (error) linger_ = false;
  }
}

}  // namespace millrace::server
