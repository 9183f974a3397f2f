#include "server/gateway/http_session.h"

#include <boost/asio/as_tuple.hpp>
#include <boost/asio/co_spawn.hpp>
#include <boost/asio/detached.hpp>
#include <boost/asio/post.hpp>
#include <boost/asio/use_awaitable.hpp>
#include <boost/asio/write.hpp>
#include <boost/beast/core/flat_buffer.hpp>
#include <boost/beast/http.hpp>
#include <chrono>
#include <optional>
#include <set>

#include "base/log.h"
#include "base/random.h"
#include "server/gateway/answer_text.h"
#include "server/gateway/api_response.h"

namespace millrace::server {
namespace {

namespace net = boost::asio;
namespace beast = boost::beast;
namespace http = beast::http;
using beast::error_code;

constexpr const char* kJsonType = "application/json";
constexpr size_t kReadBytes = 16 << 10;
constexpr auto kLingerTime = std::chrono::seconds(2);
constexpr auto kToken = net::as_tuple(net::use_awaitable);

using HttpRequest = http::request<http::string_body>;
using HttpResponse = http::response<http::string_body>;

std::chrono::steady_clock::duration Steady(Duration duration) {
  return std::chrono::duration_cast<std::chrono::steady_clock::duration>(duration);
}

// A request id lands in logs and headers, so only a plain short one is taken from the client.
std::string RequestId(const HttpRequest& request) {
  const auto value = request["x-request-id"];
  const bool good =
      !value.empty() && value.size() <= 128 && std::all_of(value.begin(), value.end(), [](char c) {
        return std::isalnum(static_cast<unsigned char>(c)) || c == '-' || c == '_' || c == '.';
      });
  return good ? std::string(value.data(), value.size()) : RandomName("req-");
}

// Set when the client closes its side while we are busy answering.
struct PeerWatch {
  bool gone = false;
  bool stopped = false;
};

// Ends the reads of a stream after a while. The stream's own limit would close the socket before the client
// can be told.
class ReadLimit {
 public:
  ReadLimit(beast::tcp_stream& stream, Duration limit)
      : state_(std::make_shared<State>(State{&stream, false})), timer_(stream.get_executor(), Steady(limit)) {
    timer_.async_wait([state = state_](error_code error) {
      if (error || state->stream == nullptr) return;
      state->expired = true;
      state->stream->cancel();
    });
  }
  ~ReadLimit() { state_->stream = nullptr; }
  bool expired() const { return state_->expired; }

 private:
  struct State {
    beast::tcp_stream* stream;
    bool expired;
  };
  const std::shared_ptr<State> state_;  // shared with the timer's handler, which may run after this has gone
  net::steady_timer timer_;
};

struct PlainAnswer {
  std::string body;
  const char* content_type = kJsonType;
};

class Session {
 public:
  Session(beast::tcp_stream stream, std::shared_ptr<GatewayContext> context)
      : stream_(std::move(stream)), context_(std::move(context)) {}

  net::awaitable<void> Run();

  // On the strand. An answer that runs ends with an error; between requests the connection closes.
  void Stop() {
    if (generation_ != nullptr) {
      generation_->Cancel(Unavailable("this gateway is shutting down"));
    } else {
      stream_.cancel();
    }
  }

 private:
  net::awaitable<bool> ReadRequest();
  net::awaitable<void> Linger();
  net::awaitable<void> Handle();
  net::awaitable<void> HandleApi(Endpoint endpoint);
  net::awaitable<void> AnswerWhole(const ApiRequest& request, std::shared_ptr<Generation> generation);
  net::awaitable<void> AnswerStream(const ApiRequest& request, std::shared_ptr<Generation> generation);
  net::awaitable<void> Reply(int status, std::string body, const char* content_type);
  net::awaitable<void> ReplyError(const ApiError& error);
  net::awaitable<bool> WriteStreamHeader();
  net::awaitable<bool> WriteChunk(std::string data);
  void WatchPeer(std::shared_ptr<Generation> generation);
  net::awaitable<void> StopWatching();
  ApiResult<PlainAnswer> AnswerGet() const;
  bool IsRoute() const;
  ApiError NoSuchRoute() const;
  void CountRequest(int status);

  beast::tcp_stream stream_;
  const std::shared_ptr<GatewayContext> context_;  // shared: sessions may outlive the accept loop
  beast::flat_buffer buffer_;
  HttpRequest request_;
  std::string request_id_;
  std::string path_;
  bool keep_alive_ = true;
  bool linger_ = false;                     // the client may still be sending a request that was refused
  std::shared_ptr<Generation> generation_;  // of the answer that runs; shared with gRPC's callbacks
  std::shared_ptr<PeerWatch> watch_;        // shared with the watching coroutine
};

net::awaitable<void> Session::Run() {
  while (keep_alive_ && !context_->draining) {
    if (!co_await ReadRequest()) break;
    co_await Handle();
  }
  error_code ignored;
  stream_.socket().shutdown(net::ip::tcp::socket::shutdown_send, ignored);
  if (linger_) co_await Linger();
}

// Closing a socket that holds unread bytes resets the connection, and the client may lose the answer that is
// on its way. So what the client still sends is read and dropped, for a short while.
net::awaitable<void> Session::Linger() {
  stream_.expires_after(kLingerTime);
  while (true) {
    buffer_.clear();
    auto [error, bytes] = co_await stream_.async_read_some(buffer_.prepare(kReadBytes), kToken);
    (void)bytes;
    if (error) co_return;
  }
}

net::awaitable<bool> Session::ReadRequest() {
  http::request_parser<http::string_body> parser;
  parser.header_limit(context_->options.header_bytes_max);
  parser.body_limit(context_->options.body_bytes_max);
  stream_.expires_after(Steady(context_->options.idle_timeout));
  if (buffer_.size() == 0) {
    // Wait for the first bytes with the idle limit; from then on the request has its own. A read of the
    // stream, because the stream's limit does not hold for waits on its socket.
    auto [wait_error, bytes] = co_await stream_.async_read_some(buffer_.prepare(kReadBytes), kToken);
    if (wait_error) co_return false;
    buffer_.commit(bytes);
  }
  const ReadLimit limit(stream_, context_->options.header_timeout);
  stream_.expires_after(2 * Steady(context_->options.header_timeout));  // when the limit met no read to end
  auto [header_error, header_bytes] = co_await http::async_read_header(stream_, buffer_, parser, kToken);
  (void)header_bytes;
  error_code error = header_error;
  if (!error && parser.get()[http::field::expect] == "100-continue") {
    http::response<http::empty_body> go_on(http::status::continue_, 11);
    auto [write_error, write_bytes] = co_await http::async_write(stream_, go_on, kToken);
    (void)write_bytes;
    error = write_error;
  }
  if (!error && !limit.expired()) {
    auto [body_error, body_bytes] = co_await http::async_read(stream_, buffer_, parser, kToken);
    (void)body_bytes;
    error = body_error;
  }
  request_ = parser.release();
  request_id_ = RequestId(request_);
  path_ = std::string(request_.target().substr(0, request_.target().find('?')));
  keep_alive_ = request_.keep_alive();
  if (!error && !limit.expired()) co_return true;
  keep_alive_ = false;
  ApiError answer = BadRequest("", error.message());
  if (error == http::error::body_limit) {
    answer.http_status = 413;
    answer.code = "request_too_large";
    answer.message = fmt::format("the body is larger than {} bytes", context_->options.body_bytes_max);
  } else if (error == http::error::header_limit) {
    answer.http_status = 431;
    answer.code = "headers_too_large";
    answer.message = fmt::format("the headers are larger than {} bytes", context_->options.header_bytes_max);
  } else if (limit.expired()) {
    answer.http_status = 408;
    answer.code = "request_timeout";
    answer.message = "the request did not arrive in time";
  } else if (error.category() != http::make_error_code(http::error::bad_method).category() ||
             error == http::error::end_of_stream || error == http::error::partial_message) {
    co_return false;  // the connection is gone: nobody to answer
  }
  linger_ = true;
  co_await ReplyError(answer);
  co_return false;
}

net::awaitable<void> Session::Handle() {
  const bool is_post = request_.method() == http::verb::post;
  if (path_ == "/v1/chat/completions" && is_post) co_return co_await HandleApi(Endpoint::kChat);
  if (path_ == "/v1/completions" && is_post) co_return co_await HandleApi(Endpoint::kCompletions);
  const bool is_get = request_.method() == http::verb::get || request_.method() == http::verb::head;
  auto answer = is_get ? AnswerGet() : ApiResult<PlainAnswer>(NoSuchRoute());
  if (!answer.ok()) co_return co_await ReplyError(answer.error());
  co_await Reply(200, std::move(answer->body), answer->content_type);
}

// Not a coroutine: g++ 12 cannot compile braced JSON inside one.
ApiResult<PlainAnswer> Session::AnswerGet() const {
  const Json model = {{"id", context_->model.name},         {"object", "model"},
                      {"created", context_->model.created}, {"owned_by", "millrace"},
                      {"root", context_->model.name},       {"max_model_len", context_->model.context_max}};
  if (path_ == "/v1/models")
    return PlainAnswer{DumpJson(Json{{"object", "list"}, {"data", Json::array({model})}})};
  if (path_ == "/v1/models/" + context_->model.name) return PlainAnswer{DumpJson(model)};
  if (path_ == "/live") return PlainAnswer{R"({"status":"ok"})"};
  if (path_ == "/ready" || path_ == "/health") {
    if (context_->draining) return FromStatus(Unavailable("this gateway is shutting down"));
    if (!context_->membership.CanServe()) return FromStatus(Unavailable("no decode worker is ready"));
    return PlainAnswer{R"({"status":"ok"})"};
  }
  if (path_ == "/metrics")
    return PlainAnswer{context_->metrics.Text(), "text/plain; version=0.0.4; charset=utf-8"};
  return NoSuchRoute();
}

bool Session::IsRoute() const {
  static const std::set<std::string> known = {
      "/health", "/live", "/ready", "/metrics", "/v1/models", "/v1/chat/completions", "/v1/completions"};
  return known.contains(path_) || path_ == "/v1/models/" + context_->model.name;
}

ApiError Session::NoSuchRoute() const {
  ApiError error;
  error.type = "invalid_request_error";
  if (IsRoute()) {
    error.http_status = 405;
    error.code = "method_not_allowed";
    error.message = fmt::format("{} does not take this method", path_);
  } else {
    error.http_status = 404;
    error.code = path_.starts_with("/v1/models/") ? "model_not_found" : "not_found";
    error.message = fmt::format("{} does not exist", path_);
  }
  return error;
}

net::awaitable<void> Session::HandleApi(Endpoint endpoint) {
  const auto content_type = request_[http::field::content_type];
  if (!beast::iequals(content_type.substr(0, content_type.find(';')), kJsonType)) {
    ApiError error = BadRequest("", "the content type must be application/json");
    error.http_status = 415;
    error.code = "unsupported_media_type";
    co_return co_await ReplyError(error);
  }
  auto parsed = ParseApiRequest(endpoint, request_.body(), context_->model, context_->tokenizer);
  if (!parsed.ok()) co_return co_await ReplyError(parsed.error());
  const ApiRequest& request = *parsed;
  if (!request.unknown_fields.empty()) {
    LogDebug("request {}: unknown field '{}' ignored", request.id, request.unknown_fields.front());
  }
  Duration timeout = context_->options.request_timeout;
  if (request.timeout_seconds) {
    timeout = std::min(timeout, std::chrono::duration_cast<Duration>(
                                    std::chrono::duration<double>(*request.timeout_seconds)));
  }
  ++context_->requests_running;
  auto generation = Generation::Start(stream_.get_executor(), context_->membership, context_->in_flight,
                                      context_->options.generation, request, Clock::System().Now() + timeout);
  generation_ = generation;
  WatchPeer(generation);
  if (request.stream) {
    co_await AnswerStream(request, generation);
  } else {
    co_await AnswerWhole(request, generation);
  }
  generation->Cancel(Cancelled("the answer is over"));  // a stop string was met, or the client is gone
  co_await StopWatching();
  generation_.reset();
  --context_->requests_running;
}

// While an answer is being made nobody reads the socket, so a client that leaves would go unnoticed. A closed
// peer makes the socket readable with nothing to read; bytes to read are the next request, which is left
// alone.
void Session::WatchPeer(std::shared_ptr<Generation> generation) {
  watch_ = std::make_shared<PeerWatch>();
  stream_.expires_never();
  net::co_spawn(
      stream_.get_executor(),
      [this, watch = watch_, generation = std::move(generation)]() -> net::awaitable<void> {
        auto [error] = co_await stream_.socket().async_wait(net::ip::tcp::socket::wait_read, kToken);
        char byte = 0;
        if (!error && recv(stream_.socket().native_handle(), &byte, 1, MSG_PEEK | MSG_DONTWAIT) <= 0) {
          watch->gone = true;
          generation->Cancel(Cancelled("the client went away"));
        }
        watch->stopped = true;
      },
      net::detached);
}

net::awaitable<void> Session::StopWatching() {
  // The coroutine uses this session: wait until it has let go.
  error_code ignored;
  while (!watch_->stopped) {
    stream_.socket().cancel(ignored);
    net::steady_timer turn(stream_.get_executor(), std::chrono::milliseconds(0));
    co_await turn.async_wait(kToken);
  }
}

const char* FinishName(engine::FinishReason reason) {
  return reason == engine::FinishReason::kLength ? "length" : "stop";
}

net::awaitable<void> Session::AnswerWhole(const ApiRequest& request, std::shared_ptr<Generation> generation) {
  ResponseBuilder builder(request, context_->model, context_->tokenizer, std::time(nullptr));
  AnswerText assembler(context_->tokenizer, request.stop, request.skip_special_tokens);
  Usage usage;
  usage.prompt_tokens = static_cast<int32_t>(request.prompt.size());
  std::string text;
  if (request.echo) text = context_->tokenizer.Decode(request.prompt, request.skip_special_tokens);
  while (true) {
    Generation::Event event = co_await generation->Next(context_->options.keepalive);
    if (const auto* end = std::get_if<Generation::End>(&event)) {
      if (!watch_->gone) co_await ReplyError(FromStatus(end->status));
      keep_alive_ = keep_alive_ && !watch_->gone;
      co_return;
    }
    const auto* token = std::get_if<engine::TokenEvent>(&event);
    if (token == nullptr) continue;
    if (++usage.completion_tokens == 1) usage.cached_tokens = token->cached_tokens;
    builder.AddToken(token->token);
    auto delta = assembler.Push(token->token.token);
    text += delta.text;
    const bool finished = token->finish != engine::FinishReason::kNone;
    if (finished && !delta.stopped) {
      delta = assembler.Finish();
      text += delta.text;
    }
    if (finished || delta.stopped) {
      co_return co_await Reply(
          200, builder.Body(text, delta.stopped ? "stop" : FinishName(token->finish), usage), kJsonType);
    }
  }
}

net::awaitable<void> Session::AnswerStream(const ApiRequest& request,
                                           std::shared_ptr<Generation> generation) {
  ResponseBuilder builder(request, context_->model, context_->tokenizer, std::time(nullptr));
  AnswerText assembler(context_->tokenizer, request.stop, request.skip_special_tokens);
  Usage usage;
  usage.prompt_tokens = static_cast<int32_t>(request.prompt.size());
  const auto data = [](std::string body) { return "data: " + std::move(body) + "\n\n"; };
  bool started = false;
  while (true) {
    Generation::Event event = co_await generation->Next(context_->options.keepalive);
    if (watch_->gone) {
      keep_alive_ = false;
      co_return;
    }
    const auto* end = std::get_if<Generation::End>(&event);
    if (end != nullptr && !started) co_return co_await ReplyError(FromStatus(end->status));
    std::string out;
    if (!started) {
      // Until here an error could still be a plain HTTP answer.
      if (!co_await WriteStreamHeader()) co_return;
      started = true;
      if (request.endpoint == Endpoint::kChat) out += data(builder.RoleChunk(usage));
      if (request.echo)
        out += data(builder.TextChunk(context_->tokenizer.Decode(request.prompt, true), usage));
    }
    if (end != nullptr) {
      // A stream must never look complete when it is not: an error frame, then the connection breaks off.
      co_await WriteChunk(data(ErrorBody(FromStatus(end->status))));
      keep_alive_ = false;
      co_return;
    }
    bool done = false;
    if (const auto* token = std::get_if<engine::TokenEvent>(&event)) {
      if (++usage.completion_tokens == 1) usage.cached_tokens = token->cached_tokens;
      builder.AddToken(token->token);
      auto delta = assembler.Push(token->token.token);
      if (!delta.text.empty()) out += data(builder.TextChunk(delta.text, usage));
      done = delta.stopped || token->finish != engine::FinishReason::kNone;
      bool stopped = delta.stopped;
      if (done && !stopped) {
        delta = assembler.Finish();
        stopped = delta.stopped;
        if (!delta.text.empty()) out += data(builder.TextChunk(delta.text, usage));
      }
      if (done) {
        out += data(builder.FinishChunk(stopped ? "stop" : FinishName(token->finish), usage));
        if (request.include_usage) out += data(builder.UsageChunk(usage));
        out += "data: [DONE]\n\n";
      }
    } else {
      out += ": keepalive\n\n";
    }
    if (!out.empty() && !co_await WriteChunk(std::move(out))) {
      keep_alive_ = false;
      co_return;
    }
    if (!done) continue;
    stream_.expires_after(Steady(context_->options.write_timeout));
    auto [error, bytes] = co_await net::async_write(stream_, http::make_chunk_last(), kToken);
    (void)bytes;
    if (error) keep_alive_ = false;
    CountRequest(200);
    co_return;
  }
}

net::awaitable<bool> Session::WriteStreamHeader() {
  http::response<http::empty_body> header(http::status::ok, 11);
  header.set(http::field::content_type, "text/event-stream");
  header.set(http::field::cache_control, "no-cache");
  header.set("x-accel-buffering", "no");
  header.set("x-request-id", request_id_);
  header.keep_alive(keep_alive_);
  header.chunked(true);
  http::response_serializer<http::empty_body> serializer(header);
  stream_.expires_after(Steady(context_->options.write_timeout));
  auto [error, bytes] = co_await http::async_write_header(stream_, serializer, kToken);
  (void)bytes;
  stream_.expires_never();
  if (error) keep_alive_ = false;
  co_return !error;
}

net::awaitable<bool> Session::WriteChunk(std::string data) {
  stream_.expires_after(Steady(context_->options.write_timeout));
  auto [error, bytes] = co_await net::async_write(stream_, http::make_chunk(net::buffer(data)), kToken);
  (void)bytes;
  stream_.expires_never();
  co_return !error;
}

void Session::CountRequest(int status) {
  context_->metrics
      .Counter("millrace_http_requests_total", "HTTP requests answered, by path and status.",
               {{"path", IsRoute() ? path_ : "other"}, {"status", std::to_string(status)}})
      .Increment();
}

net::awaitable<void> Session::Reply(int status, std::string body, const char* content_type) {
  HttpResponse response(static_cast<http::status>(status), 11);
  response.set(http::field::content_type, content_type);
  response.set("x-request-id", request_id_);
  if (status == 429 || status == 503) response.set(http::field::retry_after, "1");
  if (status >= 500 && status != 503 && status != 504) response.set("x-should-retry", "false");
  response.keep_alive(keep_alive_);
  response.body() = std::move(body);
  response.prepare_payload();
  if (request_.method() == http::verb::head) response.body().clear();
  stream_.expires_after(Steady(context_->options.write_timeout));
  auto [error, bytes] = co_await http::async_write(stream_, response, kToken);
  (void)bytes;
  if (error) keep_alive_ = false;
  CountRequest(status);
}

net::awaitable<void> Session::ReplyError(const ApiError& error) {
  if (error.http_status >= 500)
    LogWarning("{} {}: {} {}", request_id_, path_, error.http_status, error.message);
  co_await Reply(error.http_status, ErrorBody(error), kJsonType);
}

}  // namespace

uint64_t SessionStops::Add(std::function<void()> stop) {
  std::lock_guard lock(mutex_);
  stops_.emplace(++next_id_, std::move(stop));
  return next_id_;
}

void SessionStops::Remove(uint64_t id) {
  std::lock_guard lock(mutex_);
  stops_.erase(id);
}

void SessionStops::StopAll() {
  std::lock_guard lock(mutex_);
  for (const auto& [id, stop] : stops_) stop();
}

net::awaitable<void> ServeConnection(beast::tcp_stream stream, std::shared_ptr<GatewayContext> context) {
  const auto executor = stream.get_executor();
  // Shared: what was posted by a stop may run after the session has gone.
  const auto session = std::make_shared<Session>(std::move(stream), context);
  const uint64_t id = context->stops.Add([executor, weak = std::weak_ptr<Session>(session)] {
    net::post(executor, [weak] {
      if (const auto alive = weak.lock(); alive != nullptr) alive->Stop();
    });
  });
  co_await session->Run();
  context->stops.Remove(id);
  --context->connections;
}

}  // namespace millrace::server
