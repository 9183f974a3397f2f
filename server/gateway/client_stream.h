#pragma once
// The bytes of one client connection, plain or under TLS: what Beast calls an AsyncStream.

#include <boost/asio/ssl.hpp>
#include <boost/beast/core/tcp_stream.hpp>
#include <memory>
#include <optional>
#include <utility>

namespace millrace::server {

// Not movable: TLS refers to the TCP stream inside. Confined to the stream's executor.
class ClientStream {
 public:
  using executor_type = boost::beast::tcp_stream::executor_type;

  // Plain when `tls` is null. The context is shared: it may be replaced by a newer one while this lives.
  ClientStream(boost::beast::tcp_stream tcp, std::shared_ptr<boost::asio::ssl::context> tls)
      : context_(std::move(tls)), tcp_(std::move(tcp)) {
    if (context_ != nullptr) tls_.emplace(tcp_, *context_);
  }
  ClientStream(const ClientStream&) = delete;
  ClientStream& operator=(const ClientStream&) = delete;

  executor_type get_executor() { return tcp_.get_executor(); }
  // For time limits, cancelling and options. Reads and writes go through the functions below.
  boost::beast::tcp_stream& tcp() { return tcp_; }
  using Tls = boost::asio::ssl::stream<boost::beast::tcp_stream&>;
  Tls* tls() { return tls_ ? &*tls_ : nullptr; }

  template <typename Buffers, typename Token>
  auto async_read_some(const Buffers& buffers, Token&& token) {
    if (tls_) return tls_->async_read_some(buffers, std::forward<Token>(token));
    return tcp_.async_read_some(buffers, std::forward<Token>(token));
  }
  template <typename Buffers, typename Token>
  auto async_write_some(const Buffers& buffers, Token&& token) {
    if (tls_) return tls_->async_write_some(buffers, std::forward<Token>(token));
    return tcp_.async_write_some(buffers, std::forward<Token>(token));
  }

 private:
  const std::shared_ptr<boost::asio::ssl::context> context_;
  boost::beast::tcp_stream tcp_;
  std::optional<Tls> tls_;
};

}  // namespace millrace::server
