#include "server/bench/http_asker.h"

#include <boost/asio/redirect_error.hpp>
#include <boost/asio/ssl/host_name_verification.hpp>
#include <boost/asio/use_awaitable.hpp>
#include <boost/beast/http.hpp>

namespace millrace::server {

namespace net = boost::asio;
namespace beast = boost::beast;
namespace http = beast::http;

namespace {

constexpr size_t kBodyBytesMax = size_t{64} << 20;

TimePoint Now() { return std::chrono::steady_clock::now(); }

auto Use(beast::error_code& error) { return net::redirect_error(net::use_awaitable, error); }

std::string RequestText(const LoadTarget& target, const std::string& path, const std::string& body) {
  std::string text =
      fmt::format("{} {}{} HTTP/1.1\r\nhost: {}\r\nuser-agent: millrace-bench\r\n",
                  body.empty() ? "GET" : "POST", target.path_prefix, path, target.address.ToString());
  if (!target.api_key.empty()) text += fmt::format("authorization: Bearer {}\r\n", target.api_key);
  if (!body.empty()) {
    text += fmt::format("content-type: application/json\r\ncontent-length: {}\r\n", body.size());
  }
  return text + "\r\n" + body;
}

void Fail(RequestResult* result, RequestError error, std::string message) {
  if (result->error != RequestError::kNone) return;
  result->error = error;
  result->message = std::move(message);
  result->end = Now();
}

}  // namespace

StatusOr<std::unique_ptr<Asker>> HttpAsker::Create(net::io_context& io, const LoadTarget& target) {
  std::unique_ptr<HttpAsker> asker(new HttpAsker(io, target));
  MR_ASSIGN_OR_RETURN(const std::vector<HostPort> addresses, Resolve(target.address));
  for (const HostPort& address : addresses) {
    beast::error_code error;
    const auto ip = net::ip::make_address(address.host, error);
    if (!error) asker->endpoints_.emplace_back(ip, address.port);
  }
  if (asker->endpoints_.empty()) return NotFound("{} has no address", target.address.ToString());
  if (target.tls) MR_RETURN_IF_ERROR(asker->UseTls());
  return asker;
}

Status HttpAsker::UseTls() {
  net::ssl::context& context = tls_.emplace(net::ssl::context::tls_client);
  beast::error_code error;
  context.set_verify_mode(target_.insecure ? net::ssl::verify_none : net::ssl::verify_peer, error);
  context.set_verify_callback(net::ssl::host_name_verification(target_.address.host), error);
  if (target_.ca_file.empty()) {
    context.set_default_verify_paths(error);
  } else {
    context.load_verify_file(target_.ca_file, error);
  }
  if (error) return InvalidArgument("--cacert '{}': {}", target_.ca_file, error.message());
  return OkStatus();
}

net::awaitable<Status> HttpAsker::Connect(Connection& connection, Duration timeout) {
  beast::error_code error;
  for (const net::ip::tcp::endpoint& endpoint : endpoints_) {
    connection.stream.expires_after(timeout);
    error = {};
    co_await connection.stream.async_connect(endpoint, Use(error));
    if (!error) break;
  }
  if (error) co_return Unavailable("cannot reach {}: {}", target_.address.ToString(), error.message());
  ++connections_;
  connection.stream.socket().set_option(net::ip::tcp::no_delay(true), error);
  if (!tls_.has_value()) co_return OkStatus();
  connection.tls.emplace(connection.stream, *tls_);
  // Servers of several names choose their certificate by it. An address is no name.
  beast::error_code no_address;
  net::ip::make_address(target_.address.host, no_address);
  if (no_address) SSL_set_tlsext_host_name(connection.tls->native_handle(), target_.address.host.c_str());
  co_await connection.tls->async_handshake(net::ssl::stream_base::client, Use(error));
  if (error) co_return Unavailable("no TLS with {}: {}", target_.address.ToString(), error.message());
  co_return OkStatus();
}

template <class Stream>
net::awaitable<bool> HttpAsker::AskOn(Stream& stream, Connection& connection, const std::string& path,
                                      const std::string& body, TimePoint deadline, RequestResult* result,
                                      Answer* answer, bool* reusable) {
  const std::string text = RequestText(target_, path, body);
  beast::error_code error;
  connection.stream.expires_at(std::chrono::time_point_cast<std::chrono::steady_clock::duration>(deadline));
  result->sent = Now();
  co_await net::async_write(stream, net::buffer(text), Use(error));
  http::response_parser<http::buffer_body> parser;
  parser.body_limit(boost::none);
  if (!error) co_await http::async_read_header(stream, connection.buffer, parser, Use(error));
  const auto failed = [&] {
    if (stopped_) return Fail(result, RequestError::kUnfinished, "still running at the end");
    if (error == beast::error::timeout) return Fail(result, RequestError::kTimeout, "no answer in time");
    Fail(result, RequestError::kBroken, fmt::format("the connection broke: {}", error.message()));
  };
  if (error) {
    const bool stale = connection.used && !parser.got_some() && !stopped_ && error != beast::error::timeout;
    if (!stale) failed();
    co_return !stale;
  }
  answer->status = parser.get().result_int();
  const bool measured = answer->status == 200 && !body.empty();
  AnswerMeter meter(parser.get()[http::field::content_type].starts_with("text/event-stream"), result);
  char chunk[16384];
  while (!parser.is_done() && !error && !meter.failed() && answer->body.size() < kBodyBytesMax) {
    parser.get().body().data = chunk;
    parser.get().body().size = sizeof(chunk);
    co_await http::async_read_some(stream, connection.buffer, parser, Use(error));
    if (error == http::error::need_buffer) error = {};
    const std::string_view got(chunk, sizeof(chunk) - parser.get().body().size);
    if (measured) {
      meter.Add(got, Now());
    } else {
      answer->body += got;
    }
  }
  if (error && (stopped_ || error == beast::error::timeout)) failed();
  if (measured) {
    meter.End(parser.is_done(), Now());
    answer->text = meter.text();
  } else if (error) {
    failed();
  }
  result->end = std::max(result->end, result->sent);
  *reusable = !error && parser.is_done() && parser.keep_alive();
  co_return true;
}

net::awaitable<HttpAsker::Answer> HttpAsker::Ask(std::string path, std::string body, Duration timeout,
                                                 RequestResult* result) {
  Answer answer;
  const TimePoint deadline = Now() + timeout;
  while (true) {
    std::unique_ptr<Connection> connection;
    if (!idle_.empty()) {
      connection = std::move(idle_.back());
      idle_.pop_back();
    }
    const bool is_new = connection == nullptr;
    if (is_new) connection = std::make_unique<Connection>(io_);
    busy_.insert(connection.get());
    bool reusable = false;
    bool over = true;
    result->sent = Now();
    Status connected = OkStatus();
    if (is_new) connected = co_await Connect(*connection, timeout);
    if (!connected.ok()) {
      Fail(result, stopped_ ? RequestError::kUnfinished : RequestError::kConnect,
           std::string(Message(connected)));
    } else {
      Connection& c = *connection;
      over = c.tls.has_value()
                 ? co_await AskOn(*c.tls, c, path, body, deadline, result, &answer, &reusable)
                 : co_await AskOn(c.stream, c, path, body, deadline, result, &answer, &reusable);
    }
    busy_.erase(connection.get());
    if (!over) continue;  // a kept connection that the server had closed: not this request's fault
    if (reusable && !stopped_) {
      connection->used = true;
      connection->stream.expires_never();
      idle_.push_back(std::move(connection));
    }
    co_return answer;
  }
}

void HttpAsker::Stop() {
  stopped_ = true;
  idle_.clear();
  for (Connection* connection : busy_) connection->stream.cancel();
}

}  // namespace millrace::server
