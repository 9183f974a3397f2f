// chat: a terminal client of any OpenAI-compatible server; plain HTTP/1.1 with streaming.
#include <unistd.h>

#include <boost/asio/connect.hpp>
#include <boost/asio/io_context.hpp>
#include <boost/asio/ip/tcp.hpp>
#include <boost/beast/core.hpp>
#include <boost/beast/http.hpp>
#include <iostream>

#include "base/json.h"
#include "base/net.h"
#include "server/cli/commands.h"

namespace millrace::server {
namespace {

namespace net = boost::asio;
namespace beast = boost::beast;
namespace http = beast::http;
using net::ip::tcp;

struct ServerUrl {
  HostPort address;
  std::string prefix;  // path before /v1, without a final '/'
};

StatusOr<ServerUrl> ParseUrl(const std::string& url) {
  constexpr std::string_view kScheme = "http://";
  if (!url.starts_with(kScheme)) return InvalidArgument("--url '{}': only http:// is supported", url);
  const std::string rest = url.substr(kScheme.size());
  const size_t slash = rest.find('/');
  ServerUrl parsed;
  MR_ASSIGN_OR_RETURN(parsed.address, ParseHostPort(rest.substr(0, slash), "127.0.0.1", 80));
  if (slash != std::string::npos) parsed.prefix = rest.substr(slash);
  while (parsed.prefix.ends_with('/')) parsed.prefix.pop_back();
  return parsed;
}

// Splits a byte stream into server-sent events' data lines.
class EventSplitter {
 public:
  void Add(std::string_view bytes) { pending_ += bytes; }
  bool Next(std::string* data) {
    while (true) {
      const size_t end = pending_.find('\n');
      if (end == std::string::npos) return false;
      std::string line = pending_.substr(0, end);
      pending_.erase(0, end + 1);
      if (!line.empty() && line.back() == '\r') line.pop_back();
      if (line.starts_with("data: ")) {
        *data = line.substr(6);
        return true;
      }
    }
  }

 private:
  std::string pending_;
};

class ChatClient {
 public:
  explicit ChatClient(ServerUrl url) : url_(std::move(url)) {}

  // The served model's name.
  StatusOr<std::string> FirstModel() {
    MR_ASSIGN_OR_RETURN(beast::tcp_stream stream, Connect());
    http::request<http::empty_body> request(http::verb::get, url_.prefix + "/v1/models", 11);
    request.set(http::field::host, url_.address.ToString());
    beast::error_code error;
    http::write(stream, request, error);
    beast::flat_buffer buffer;
    http::response<http::string_body> response;
    if (!error) http::read(stream, buffer, response, error);
    if (error) return Unavailable("{}: {}", url_.address.ToString(), error.message());
    MR_ASSIGN_OR_RETURN(const Json body, ParseJson(response.body()));
    if (!body.is_object() || !body.contains("data") || !body["data"].is_array() || body["data"].empty()) {
      return Unavailable("{}/v1/models names no model", url_.address.ToString());
    }
    return body["data"][0].value("id", "");
  }

  // Prints the answer as it comes and returns it.
  StatusOr<std::string> Ask(const Json& body) {
    MR_ASSIGN_OR_RETURN(beast::tcp_stream stream, Connect());
    http::request<http::string_body> request(http::verb::post, url_.prefix + "/v1/chat/completions", 11);
    request.set(http::field::host, url_.address.ToString());
    request.set(http::field::content_type, "application/json");
    request.body() = DumpJson(body);
    request.prepare_payload();
    beast::error_code error;
    http::write(stream, request, error);
    beast::flat_buffer buffer;
    http::response_parser<http::buffer_body> parser;
    parser.body_limit(boost::none);
    if (!error) http::read_header(stream, buffer, parser, error);
    if (error) return Unavailable("{}: {}", url_.address.ToString(), error.message());
    return ReadAnswer(stream, buffer, parser);
  }

 private:
  StatusOr<beast::tcp_stream> Connect() {
    MR_ASSIGN_OR_RETURN(const auto addresses, Resolve(url_.address));
    beast::tcp_stream stream(io_);
    beast::error_code error;
    const tcp::endpoint endpoint(net::ip::make_address(addresses.front().host, error), url_.address.port);
    if (!error) stream.connect(endpoint, error);
    if (error) return Unavailable("cannot reach {}: {}", url_.address.ToString(), error.message());
    return stream;
  }

  static StatusOr<std::string> ReadAnswer(beast::tcp_stream& stream, beast::flat_buffer& buffer,
                                          http::response_parser<http::buffer_body>& parser) {
    const bool is_stream = parser.get()[http::field::content_type].starts_with("text/event-stream");
    EventSplitter events;
    std::string plain;
    std::string answer;
    bool done = false;
    while (!parser.is_done()) {
      char chunk[4096];
      parser.get().body().data = chunk;
      parser.get().body().size = sizeof(chunk);
      beast::error_code error;
      http::read(stream, buffer, parser, error);
      if (error == http::error::need_buffer) error = {};
      const std::string_view got(chunk, sizeof(chunk) - parser.get().body().size);
      if (!is_stream) plain += got;
      events.Add(got);
      std::string data;
      while (is_stream && events.Next(&data)) {
        if (data == "[DONE]") {
          done = true;
          continue;
        }
        MR_ASSIGN_OR_RETURN(const Json event, ParseJson(data));
        if (event.contains("error"))
          return Unavailable("{}", event["error"].value("message", "the server failed"));
        if (!event.contains("choices") || event["choices"].empty()) continue;
        const Json& delta = event["choices"][0]["delta"];
        if (delta.is_object() && delta.contains("content") && delta["content"].is_string()) {
          const auto& text = delta["content"].get_ref<const std::string&>();
          answer += text;
          std::cout << text << std::flush;
        }
      }
      if (error) return Unavailable("the connection broke in the middle of the answer: {}", error.message());
    }
    if (is_stream && !done) return Unavailable("the answer ended without its end mark");
    if (is_stream) return answer;
    const auto body = ParseJson(plain);
    if (body.ok() && body->is_object() && body->contains("error") && (*body)["error"].is_object()) {
      return InvalidArgument("{}", (*body)["error"].value("message", plain));
    }
    return Unavailable("unexpected answer: HTTP {}", parser.get().result_int());
  }

  const ServerUrl url_;
  net::io_context io_;
};

Status Chat(const ChatOptions& options) {
  MR_ASSIGN_OR_RETURN(ServerUrl url, ParseUrl(options.url));
  ChatClient client(std::move(url));
  MR_ASSIGN_OR_RETURN(const std::string model, client.FirstModel());
  Json messages = Json::array();
  if (!options.system.empty()) messages.push_back({{"role", "system"}, {"content", options.system}});
  const bool once = !options.prompt.empty();
  if (!once) fmt::print("{} at {} - an empty line or Ctrl-D ends\n", model, options.url);
  while (true) {
    std::string line = options.prompt;
    if (!once) {
      fmt::print("> ");
      std::fflush(stdout);
      if (!std::getline(std::cin, line) || line.empty()) break;
    }
    messages.push_back({{"role", "user"}, {"content", line}});
    Json body = {
        {"model", model}, {"messages", messages}, {"stream", true}, {"temperature", options.temperature}};
    if (options.max_tokens > 0) body["max_tokens"] = options.max_tokens;
    const auto answer = client.Ask(body);
    std::cout << std::endl;
    if (!answer.ok()) {
      if (once) return answer.status();
      fmt::print(stderr, "error: {}\n", Message(answer.status()));
      messages.erase(messages.size() - 1);
      continue;
    }
    if (once) break;
    messages.push_back({{"role", "assistant"}, {"content", *answer}});
  }
  return OkStatus();
}

}  // namespace

int RunChat(const ChatOptions& options) {
  const Status status = Chat(options);
  if (status.ok()) return 0;
  fmt::print(stderr, "millrace chat: {}\n", Message(status));
  return 1;
}

}  // namespace millrace::server
