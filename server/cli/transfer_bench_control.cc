#include "server/cli/transfer_bench_control.h"

#include <charconv>

namespace millrace::server {
namespace {

constexpr size_t kLineBytesMax = 1 << 20;
constexpr Duration kPatience = std::chrono::seconds(20);

}  // namespace

StatusOr<BenchControl> BenchControl::Connect(const HostPort& address) {
  MR_ASSIGN_OR_RETURN(const std::vector<HostPort> resolved, Resolve(address));
  auto stream = std::make_unique<Stream>();
  stream->expires_after(std::chrono::seconds(5));
  boost::system::error_code error;
  const auto host = boost::asio::ip::make_address(resolved.front().host, error);
  if (error) return InvalidArgument("{}: {}", resolved.front().host, error.message());
  stream->connect(boost::asio::ip::tcp::endpoint(host, address.port));
  if (!*stream)
    return Unavailable("no transfer-bench target at {}: {}", address.ToString(), stream->error().message());
  stream->socket().set_option(boost::asio::ip::tcp::no_delay(true), error);
  return BenchControl(std::move(stream));
}

Status BenchControl::Send(const Json& message) {
  stream_->expires_after(kPatience);
  *stream_ << DumpJson(message) << '\n' << std::flush;
  if (!*stream_) return Unavailable("the other side of the benchmark is gone");
  return OkStatus();
}

StatusOr<Json> BenchControl::Receive(Duration patience) {
  stream_->expires_after(patience);
  std::string line;
  for (int c = stream_->get(); c != '\n'; c = stream_->get()) {
    if (!*stream_) return Unavailable("the other side of the benchmark is gone");
    if (line.size() == kLineBytesMax)
      return InvalidArgument("a control line of over {} bytes", kLineBytesMax);
    line.push_back(static_cast<char>(c));
  }
  return ParseJson(line);
}

StatusOr<Json> BenchControl::Ask(const Json& question) {
  MR_RETURN_IF_ERROR(Send(question));
  MR_ASSIGN_OR_RETURN(Json answer, Receive(kPatience));
  if (!answer.is_object()) return InvalidArgument("the target's answer is not an object");
  MR_ASSIGN_OR_RETURN(const auto error, GetString(answer, "error"));
  if (error.has_value()) return FailedPrecondition("the target says: {}", *error);
  return answer;
}

std::string ToHex(const std::string& bytes) {
  std::string digits;
  for (const char c : bytes) digits += fmt::format("{:02x}", static_cast<unsigned char>(c));
  return digits;
}

StatusOr<std::string> FromHex(const std::string& digits) {
  if (digits.size() % 2 != 0) return InvalidArgument("an odd number of hexadecimal digits");
  std::string bytes;
  for (size_t i = 0; i < digits.size(); i += 2) {
    unsigned value = 0;
    const char* const end = digits.data() + i + 2;
    const auto [at, error] = std::from_chars(digits.data() + i, end, value, 16);
    if (error != std::errc() || at != end) return InvalidArgument("not hexadecimal");
    bytes.push_back(static_cast<char>(value));
  }
  return bytes;
}

}  // namespace millrace::server
