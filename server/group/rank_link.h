#pragma once
// One TCP connection between two ranks, of messages that are small and in order.

#include <boost/asio/ip/tcp.hpp>
#include <functional>
#include <memory>
#include <mutex>
#include <string>

#include "proto/group.pb.h"

namespace millrace::server {

namespace group = ::millrace::group::v1;  // generated messages

class RankLink : public std::enable_shared_from_this<RankLink> {
 public:
  using OnMessage = std::function<void(const group::GroupMessage&)>;
  using OnClosed = std::function<void(const std::string& why)>;

  explicit RankLink(boost::asio::ip::tcp::socket socket);

  // Both are called on the thread of the socket's executor; on_closed once, as the last.
  void Start(OnMessage on_message, OnClosed on_closed);
  // Any thread; never blocks. A peer that does not take what it is sent loses the connection.
  void Send(const group::GroupMessage& message);
  // Any thread; on_closed follows. What was sent still goes out.
  void Close(const std::string& why);

 private:
  void Read();
  bool TakeMessages();

  boost::asio::ip::tcp::socket socket_;
  OnMessage on_message_;
  OnClosed on_closed_;
  std::string input_;  // what has come and is no whole message yet

  std::mutex mutex_;  // the descriptor against its end, and the order of what is sent
  bool open_ = true;
  std::string why_;
  std::string frame_;
};

}  // namespace millrace::server
