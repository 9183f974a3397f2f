#pragma once
// A way between two sockets that can be cut as a network is: nothing comes through any more, and nobody is
// told.

#include <array>
#include <atomic>
#include <boost/asio/io_context.hpp>
#include <boost/asio/ip/tcp.hpp>
#include <boost/asio/write.hpp>
#include <memory>
#include <thread>

#include "base/net.h"

namespace millrace::server {

class CutProxy {
 public:
  explicit CutProxy(const HostPort& target)
      : target_(boost::asio::ip::make_address(target.host), target.port),
        acceptor_(io_, {boost::asio::ip::make_address("127.0.0.1"), 0}) {
    Accept();
    thread_ = std::thread([this] { io_.run(); });
  }
  ~CutProxy() {
    io_.stop();
    thread_.join();
  }
  HostPort address() const { return {"127.0.0.1", acceptor_.local_endpoint().port()}; }
  void Cut() { cut_ = true; }

 private:
  using tcp = boost::asio::ip::tcp;
  struct Pair {
    explicit Pair(boost::asio::io_context& io) : a(io), b(io) {}
    tcp::socket a;
    tcp::socket b;
  };

  void Accept() {
    auto pair = std::make_shared<Pair>(io_);
    acceptor_.async_accept(pair->a, [this, pair](const boost::system::error_code& error) {
      if (error) return;
      Accept();
      boost::system::error_code refused;
      pair->b.connect(target_, refused);
      if (refused) return;
      Carry(pair, pair->a, pair->b);
      Carry(pair, pair->b, pair->a);
    });
  }
  void Carry(const std::shared_ptr<Pair>& pair, tcp::socket& from, tcp::socket& to) {
    auto bytes = std::make_shared<std::array<char, 65536>>();
    from.async_read_some(
        boost::asio::buffer(*bytes),
        [this, pair, &from, &to, bytes](const boost::system::error_code& error, size_t count) {
          if (cut_) return kept_.push_back(pair);
          boost::system::error_code failed;
          if (error) return to.close(failed), void();
          boost::asio::write(to, boost::asio::buffer(bytes->data(), count), failed);
          if (!failed) Carry(pair, from, to);
        });
  }

  const tcp::endpoint target_;
  boost::asio::io_context io_;
  tcp::acceptor acceptor_;
  std::atomic<bool> cut_{false};
  std::vector<std::shared_ptr<Pair>> kept_;  // open, so that neither side sees an end
  std::thread thread_;
};

}  // namespace millrace::server
