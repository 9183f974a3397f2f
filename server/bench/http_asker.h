#pragma once
// HTTP/1.1: connections to one server, kept alive and used again, and one request on each at a time.

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

#include "server/bench/asker.h"
#include "server/bench/load.h"

namespace millrace::server {

class HttpAsker : public Asker {
 public:
  static StatusOr<std::unique_ptr<Asker>> Create(boost::asio::io_context& io, const LoadTarget& target);
  boost::asio::awaitable<Answer> Ask(std::string path, std::string body, Duration timeout,
                                     RequestResult* result) override;
  void Stop() override;
  int64_t connections() const override { return connections_; }

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
