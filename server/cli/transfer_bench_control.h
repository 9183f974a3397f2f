#pragma once
// What target and initiator of transfer-bench tell each other: one JSON object per line over TCP, a question
// and its answer in turn. Not thread-safe.

#include <boost/asio/ip/tcp.hpp>
#include <memory>
#include <string>

#include "base/clock.h"
#include "base/json.h"
#include "base/net.h"

namespace millrace::server {

class BenchControl {
 public:
  using Stream = boost::asio::ip::tcp::iostream;
  static StatusOr<BenchControl> Connect(const HostPort& address);
  explicit BenchControl(std::unique_ptr<Stream> stream) : stream_(std::move(stream)) {}

  // Unavailable when the other side is gone or says nothing for `patience`.
  Status Send(const Json& message);
  StatusOr<Json> Receive(Duration patience);
  // A question and its answer; the other side's "error" becomes a status.
  StatusOr<Json> Ask(const Json& question);

 private:
  std::unique_ptr<Stream> stream_;
};

// Bytes as hexadecimal digits and back; InvalidArgument for anything else.
std::string ToHex(const std::string& bytes);
StatusOr<std::string> FromHex(const std::string& digits);

}  // namespace millrace::server
