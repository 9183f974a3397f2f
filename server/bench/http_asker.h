#pragma once
// The wire: connections to one server, kept alive and used again, and one request on each at a time.
// io_context's thread.

#include <boost/asio/awaitable.hpp>
#include <boost/asio/io_context.hpp>
#include <boost/asio/ip/tcp.hpp>
#include <boost/asio/ssl/context.hpp>
#include <boost/asio/ssl/stream.hpp>
#include <boost/beast/core/flat_buffer.hpp>
#include <boost/beast/core/tcp_stream.hpp>
#include <memory>
#include <optional>
#include <set>
#include <string>
#include <vector>

#include "server/bench/answer_meter.h"
#include "server/bench/load.h"

namespace millrace::server {

class HttpAsker {
 public:
  // `target` is borrowed for the asker's life. Resolution happens here, once; NotFound when the name has no
  // address, InvalidArgument when --cacert is no file of certificates.
  static StatusOr<std::unique_ptr<HttpAsker>> Create(boost::asio::io_context& io, const LoadTarget& target);

  struct Answer {
    int status = 0;
    std::string body;  // when not a 200 of a POST
    std::string text;  // the answer's content
  };
  // GET, or POST when `body` is not empty. Fills `result` (sent .. message); the answer of a POST that began
  // well goes through an AnswerMeter.
  boost::asio::awaitable<Answer> Ask(std::string path, std::string body, Duration timeout,
                                     RequestResult* result);

  // Ends what is running: it fails with kUnfinished. Nothing new may be asked.
  void Stop();
  int64_t connections() const { return connections_; }

 private:
  struct Connection {
    explicit Connection(boost::asio::io_context& io) : stream(io) {}
    boost::beast::tcp_stream stream;
    std::optional<boost::asio::ssl::stream<boost::beast::tcp_stream&>> tls;  // around `stream`, for https
    boost::beast::flat_buffer buffer;
    bool used = false;  // it has carried an answer: the server may have closed it since
  };
  HttpAsker(boost::asio::io_context& io, const LoadTarget& target) : io_(io), target_(target) {}
  Status UseTls();
  boost::asio::awaitable<Status> Connect(Connection& connection, Duration timeout);
  // `stream` is the connection's, encrypted or not. False: the connection was stale and nothing of the answer
  // came; ask again on a new one.
  template <class Stream>
  boost::asio::awaitable<bool> AskOn(Stream& stream, Connection& connection, const std::string& path,
                                     const std::string& body, TimePoint deadline, RequestResult* result,
                                     Answer* answer, bool* reusable);

  boost::asio::io_context& io_;
  const LoadTarget& target_;
  std::vector<boost::asio::ip::tcp::endpoint> endpoints_;
  std::optional<boost::asio::ssl::context> tls_;
  std::vector<std::unique_ptr<Connection>> idle_;
  std::set<Connection*> busy_;
  int64_t connections_ = 0;
  bool stopped_ = false;
};

}  // namespace millrace::server
