#pragma once
// HTTP/1.1 on one client connection: requests come in with limits on size and time, answers go out whole or
// as a stream of chunks, and a client that leaves is noticed.

#include <boost/asio/awaitable.hpp>
#include <boost/beast/core/flat_buffer.hpp>
#include <boost/beast/http/message.hpp>
#include <boost/beast/http/string_body.hpp>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "server/gateway/api_error.h"
#include "server/gateway/client_stream.h"
#include "server/gateway/gateway.h"

namespace millrace::server {

using HttpRequest = boost::beast::http::request<boost::beast::http::string_body>;
using HttpResponse = boost::beast::http::response<boost::beast::http::string_body>;

// Confined to the stream's strand. The options outlive it.
class HttpConnection {
 public:
  HttpConnection(boost::beast::tcp_stream tcp, std::shared_ptr<boost::asio::ssl::context> tls,
                 const GatewayOptions& options);

  // The TLS handshake, if any. False: there is nobody to talk to.
  boost::asio::awaitable<bool> Handshake();

  enum class ReadOutcome { kRequest, kRefused, kClosed };
  // Looks at a request whose body has not been read: an error refuses it.
  using Gate = std::function<std::optional<ApiError>(const HttpRequest& header, const std::string& path)>;
  // Waits for the next request. kRefused: `refusal()` is the answer to it, after which the connection ends.
  boost::asio::awaitable<ReadOutcome> Read(const Gate& gate);
  const ApiError& refusal() const { return refusal_; }
  const HttpRequest& request() const { return request_; }
  const std::string& path() const { return path_; }              // of the target, without the query
  const std::string& request_id() const { return request_id_; }  // the client's, or one of our own

  // Another request may follow; false once the connection has to end.
  bool keep_alive() const { return keep_alive_; }
  void EndAfterThis() { keep_alive_ = false; }

  // Fields for every answer to the current request, from now on.
  void SetAnswerHeaders(std::vector<std::pair<std::string, std::string>> headers) {
    answer_headers_ = std::move(headers);
  }
  // A whole answer; fields that every answer has are added. The body is dropped for HEAD.
  boost::asio::awaitable<void> Write(HttpResponse response);
  // An answer in chunks. False when the client is gone. Without EndStream the answer reads as cut off.
  boost::asio::awaitable<bool> BeginStream(HttpResponse header);
  boost::asio::awaitable<bool> WriteChunk(std::string data);
  boost::asio::awaitable<void> EndStream();

  // From here to StopWatching nobody reads: a client that leaves meanwhile is told to `on_gone`, on the
  // strand.
  void WatchPeer(std::function<void()> on_gone);
  boost::asio::awaitable<void> StopWatching();
  bool peer_gone() const { return watch_ != nullptr && watch_->gone; }

  // Breaks a Read that waits.
  void CancelRead() { stream_.tcp().cancel(); }
  // The last call: says goodbye, and lets a client that was refused finish sending.
  boost::asio::awaitable<void> Close();

  boost::asio::any_io_executor executor() { return stream_.get_executor(); }

 private:
  struct Watch {
    bool gone = false;
    bool stopped = false;
    bool stopping = false;
  };

  boost::asio::awaitable<void> RunWatch(std::shared_ptr<Watch> watch, std::function<void()> on_gone);
  void TakeHeader(const HttpRequest& header);
  bool ClassifyReadError(boost::beast::error_code error, bool timed_out);
  void LimitWrite();

  ClientStream stream_;
  const GatewayOptions& options_;
  boost::beast::flat_buffer buffer_;
  HttpRequest request_;
  ApiError refusal_;
  std::string request_id_;
  std::string path_;
  std::vector<std::pair<std::string, std::string>> answer_headers_;
  bool keep_alive_ = true;
  bool linger_ = false;           // the client may still be sending a request that was refused
  std::shared_ptr<Watch> watch_;  // shared with the watching coroutine
};

}  // namespace millrace::server
