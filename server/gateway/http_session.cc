#include "server/gateway/http_session.h"

#include <boost/asio/post.hpp>
#include <boost/beast/http.hpp>

#include "base/log.h"
#include "server/gateway/http_answer.h"
#include "server/gateway/http_connection.h"
#include "server/gateway/plain_answers.h"

namespace millrace::server {
namespace {

namespace net = boost::asio;
namespace beast = boost::beast;
namespace http = beast::http;

constexpr const char* kJsonType = "application/json";
constexpr std::string_view kModelPrefix = "/v1/models/";

using Get = ApiResult<PlainAnswer> (*)(GatewayContext&);
using Post = ApiResult<PlainAnswer> (*)(GatewayContext&, const std::string& body);

struct Route {
  const char* path;
  Access access = Access::kClient;
  Get get = nullptr;                           // GET and HEAD
  Post post = nullptr;                         // POST of a JSON body
  std::optional<Endpoint> api = std::nullopt;  // POST of a request that workers answer
};

const Route kRoutes[] = {
    {.path = "/", .access = Access::kOpen, .get = WebPage},
    {.path = "/openapi.json", .access = Access::kWatch, .get = OpenApi},
    {.path = "/state", .access = Access::kWatch, .get = State},
    {.path = "/live", .access = Access::kOpen, .get = Live},
    {.path = "/ready", .access = Access::kOpen, .get = Ready},
    {.path = "/health", .access = Access::kOpen, .get = Health},
    {.path = "/metrics", .access = Access::kOperator, .get = MetricsText},
    {.path = "/version", .access = Access::kWatch, .get = Version},
    {.path = "/info", .access = Access::kWatch, .get = Info},
    {.path = "/load", .access = Access::kWatch, .get = Load},
    {.path = "/abort", .access = Access::kOperator, .post = Abort},
    {.path = "/v1/models", .get = ListModels},
    {.path = "/v1/chat/completions", .api = Endpoint::kChat},
    {.path = "/v1/completions", .api = Endpoint::kCompletions},
    {.path = "/v1/responses", .api = Endpoint::kResponses},
    {.path = "/tokenize", .post = Tokenize},
    {.path = "/detokenize", .post = Detokenize},
    {.path = "/apply-template", .post = ApplyTemplate},
};

const Route* FindRoute(const std::string& path) {
  for (const Route& route : kRoutes) {
    if (path == route.path) return &route;
  }
  return nullptr;
}

// Not in a coroutine: g++ 12 mistakes what it inlines there.
HttpResponse ToResponse(const ApiResult<PlainAnswer>& answer) {
  if (!answer.ok()) return ErrorResponse(answer.error());
  HttpResponse response;
  response.result(http::status::ok);
  response.set(http::field::content_type, answer->content_type);
  response.body() = answer->body;
  return response;
}

class Session {
 public:
  Session(beast::tcp_stream stream, Listener listener, std::shared_ptr<GatewayContext> context)
      : context_(std::move(context)),
        listener_(listener),
        connection_(
            std::move(stream),
            listener == Listener::kPublic && context_->tls != nullptr ? context_->tls->Get() : nullptr,
            context_->options) {}

  net::awaitable<void> Run() {
    if (!co_await connection_.Handshake()) co_return;
    const HttpConnection::Gate gate = [this](const HttpRequest& header, const std::string& path) {
      return Admit(header, path);
    };
    while (connection_.keep_alive() && !context_->draining) {
      const auto outcome = co_await connection_.Read(gate);
      if (outcome == HttpConnection::ReadOutcome::kClosed) break;
      const bool readable = outcome == HttpConnection::ReadOutcome::kRequest;
      const std::optional<Endpoint> api = readable ? ApiOf() : std::nullopt;
      int status = 0;
      if (api) {
        answering_ = true;
        const HttpOutcome answered = co_await AnswerApi(connection_, *context_, *api, key_);
        answering_ = false;
        status = answered.status;
      } else {
        HttpResponse response = readable ? AnswerPlain() : Refuse(connection_.refusal());
        status = static_cast<int>(response.result_int());
        co_await connection_.Write(std::move(response));
      }
      if (status != 0) Count(status);
    }
    co_await connection_.Close();
  }

  // On the strand. Between requests the connection closes; an answer that runs has its own stop.
  void Stop() {
    if (!answering_) connection_.CancelRead();
  }

 private:
  std::optional<ApiError> Admit(const HttpRequest& header, const std::string& path) {
    key_.clear();
    connection_.SetAnswerHeaders(CorsHeaders(context_->options, header));
    if (IsPreflight(context_->options, header)) return std::nullopt;
    const Route* const route = FindRoute(path);
    return CheckAccess(*context_, listener_, route == nullptr ? Access::kClient : route->access, header,
                       &key_);
  }

  bool IsJson() const {
    const auto content_type = connection_.request()[http::field::content_type];
    return beast::iequals(content_type.substr(0, content_type.find(';')), kJsonType);
  }

  // The endpoint when workers have to answer.
  std::optional<Endpoint> ApiOf() const {
    const Route* const route = FindRoute(connection_.path());
    if (route == nullptr || connection_.request().method() != http::verb::post || !IsJson())
      return std::nullopt;
    return route->api;
  }

  HttpResponse AnswerPlain() {
    const std::string& path = connection_.path();
    const http::verb method = connection_.request().method();
    const bool is_get = method == http::verb::get || method == http::verb::head;
    if (IsPreflight(context_->options, connection_.request())) {
      HttpResponse response;
      response.result(http::status::no_content);
      return response;
    }
    const bool one_model = path.starts_with(kModelPrefix) && listener_ == Listener::kPublic;
    if (one_model && is_get) return ToResponse(DescribeOneModel(*context_, path.substr(kModelPrefix.size())));
    const Route* const route = FindRoute(path);
    if (route == nullptr && !one_model)
      return Refuse(EdgeError(404, "not_found", "there is nothing at this address"));
    if (route != nullptr && route->get != nullptr && is_get) return Log(ToResponse(route->get(*context_)));
    if (route == nullptr || route->get != nullptr || method != http::verb::post)
      return Refuse(EdgeError(405, "method_not_allowed", fmt::format("{} does not take this method", path)));
    if (!IsJson())
      return Refuse(EdgeError(415, "unsupported_media_type", "the content type must be application/json"));
    return Log(ToResponse(route->post(*context_, connection_.request().body())));
  }

  HttpResponse Refuse(const ApiError& error) { return Log(ErrorResponse(error)); }

  HttpResponse Log(HttpResponse response) const {
    const bool probe = connection_.path() == "/ready" || connection_.path() == "/health";
    if (response.result_int() >= 500 && !probe)
      LogWarning("{} {}: {}", connection_.request_id(), connection_.path(), response.result_int());
    return response;
  }

  // A client may write what it likes there.
  const char* MethodLabel() const {
    switch (connection_.request().method()) {
      case http::verb::get:
        return "GET";
      case http::verb::head:
        return "HEAD";
      case http::verb::post:
        return "POST";
      case http::verb::options:
        return "OPTIONS";
      default:
        return "other";
    }
  }

  void Count(int status) {
    const Route* const route = FindRoute(connection_.path());
    const bool model = connection_.path().starts_with(kModelPrefix);
    context_->metrics
        .Counter("millrace_http_requests_total", "HTTP requests answered, by path, method and status.",
                 {{"path", route != nullptr ? route->path
                           : model          ? "/v1/models"
                                            : "other"},
                  {"method", MethodLabel()},
                  {"status", std::to_string(status)}})
        .Increment();
  }

  const std::shared_ptr<GatewayContext> context_;  // shared: sessions may outlive the accept loop
  const Listener listener_;
  HttpConnection connection_;
  std::string key_;  // name of the current request's API key
  bool answering_ = false;
};

}  // namespace

net::awaitable<void> ServeConnection(beast::tcp_stream stream, Listener listener,
                                     std::shared_ptr<GatewayContext> context) {
  const auto executor = stream.get_executor();
  // Shared: what was posted by a stop may run after the session has gone.
  const auto session = std::make_shared<Session>(std::move(stream), listener, context);
  const uint64_t id = context->connections_stops.Add([executor, weak = std::weak_ptr<Session>(session)] {
    net::post(executor, [weak] {
      if (const auto alive = weak.lock(); alive != nullptr) alive->Stop();
    });
  });
  co_await session->Run();
  context->connections_stops.Remove(id);
  --context->connections;
}

}  // namespace millrace::server
