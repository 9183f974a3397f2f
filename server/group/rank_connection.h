#pragma once
// One TCP connection between two ranks, of messages that are small and in order, for as long as it lasts.

#include <boost/asio/ip/tcp.hpp>
#include <functional>
#include <memory>
#include <mutex>
#include <string>

#include "proto/group.pb.h"

namespace millrace::server {

namespace group = ::millrace::group::v1;  // generated messages

class RankConnection : public std::enable_shared_from_this<RankConnection> {
 public:
  using OnMessage = std::function<void(const group::GroupMessage&)>;
  // by_peer: the process at the other end has ended it, or has ended; or it says what no rank says. Else the
  // way there is to blame, or this side.
  using OnClosed = std::function<void(const std::string& why, bool by_peer)>;

  explicit RankConnection(boost::asio::ip::tcp::socket socket);

  static std::string Frame(const group::GroupMessage& message);

  // Both are called on the thread of the socket's executor; on_closed once, as the last.
  void Start(OnMessage on_message, OnClosed on_closed);
  // Any thread; never blocks. What does not fit into the socket waits here.
  void Send(const std::string& frame);
  // Any thread; on_closed follows. What the socket has taken still goes out.
  void Close(const std::string& why) { End(why, /*by_peer=*/false); }

 private:
  void Read();
  bool TakeMessages();
  void WriteOn();
  void Write(const char* bytes, size_t count);
  void End(const std::string& why, bool by_peer);
  void EndLocked(const std::string& why, bool by_peer);

  boost::asio::ip::tcp::socket socket_;
  OnMessage on_message_;
  OnClosed on_closed_;
  std::string input_;  // what has come and is no whole message yet

  std::mutex mutex_;  // the descriptor against its end, and the order of what is sent
  bool open_ = true;
  bool by_peer_ = false;
  std::string why_;
  std::string output_;  // does not fit yet
};

}  // namespace millrace::server
