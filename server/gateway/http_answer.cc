#include "server/gateway/http_answer.h"

#include <algorithm>
#include <boost/asio/post.hpp>
#include <boost/beast/http.hpp>
#include <ctime>
#include <memory>

#include "base/log.h"
#include "server/gateway/api_response.h"
#include "server/gateway/responses.h"
#include "server/gateway/responses_body.h"

namespace millrace::server {
namespace {

namespace net = boost::asio;
namespace http = boost::beast::http;

constexpr const char* kJsonType = "application/json";

struct Prepared {
  std::unique_ptr<const ApiRequest> request;  // its address stays
  std::unique_ptr<AnswerFormat> format;
};

ApiResult<Prepared> Prepare(Endpoint endpoint, const std::string& body, const GatewayContext& context) {
  const bool responses = endpoint == Endpoint::kResponses;
  std::string chat_body;
  if (responses) {
    auto converted = ChatBodyOf(body);
    if (!converted.ok()) return converted.error();
    chat_body = DumpJson(*converted);
  }
  auto parsed = ParseApiRequest(responses ? Endpoint::kChat : endpoint, responses ? chat_body : body,
                                context.model, context.tokenizer);
  if (!parsed.ok()) return responses ? InNamesOfResponses(parsed.error()) : parsed.error();
  Prepared prepared;
  prepared.request = std::make_unique<const ApiRequest>(*std::move(parsed));
  const int64_t now = std::time(nullptr);
  if (responses) {
    prepared.format = MakeResponsesFormat(*prepared.request, context.model, body, now);
  } else {
    prepared.format =
        std::make_unique<ResponseBuilder>(*prepared.request, context.model, context.tokenizer, now);
  }
  return prepared;
}

HttpResponse StreamHeader() {
  HttpResponse header;
  header.result(http::status::ok);
  header.set(http::field::content_type, "text/event-stream");
  header.set(http::field::cache_control, "no-cache");
  header.set("x-accel-buffering", "no");
  return header;
}

HttpResponse WholeResponse(std::string body) {
  HttpResponse response;
  response.result(http::status::ok);
  response.set(http::field::content_type, kJsonType);
  response.body() = std::move(body);
  return response;
}

TraceContext TraceOf(const HttpRequest& request) {
  const auto parent = request["traceparent"];
  if (parent.empty()) return {};
  std::string state;  // may come in several fields
  const auto [begin, end] = request.equal_range("tracestate");
  for (auto field = begin; field != end; ++field)
    state += (state.empty() ? "" : ",") + std::string(field->value());
  return ParseTraceContext({parent.data(), parent.size()}, state);
}

// Says it in the log too when it is the server's fault.
HttpResponse FailureResponse(const HttpConnection& connection, const ApiError& error) {
  if (error.http_status >= 500)
    LogWarning("{} {}: {} {}", connection.request_id(), connection.path(), error.http_status, error.message);
  return ErrorResponse(error);
}

net::awaitable<HttpOutcome> AnswerWhole(HttpConnection& connection, GatewayContext& context, Answer& answer,
                                        AnswerFormat& format) {
  while (true) {
    const Answer::Event event = co_await answer.Next(context.options.keepalive);
    if (connection.peer_gone()) {
      connection.EndAfterThis();
      co_return HttpOutcome{};
    }
    if (const auto* step = std::get_if<Answer::Step>(&event)) format.Collect(step->delta);
    const auto* failed = std::get_if<Answer::Failed>(&event);
    if (failed == nullptr && !std::holds_alternative<Answer::Done>(event)) continue;
    HttpResponse response = failed != nullptr ? FailureResponse(connection, context.FailureOf(failed->status))
                                              : WholeResponse(format.Whole(answer.usage()));
    const HttpOutcome outcome{static_cast<int>(response.result_int())};
    co_await connection.Write(std::move(response));
    co_return outcome;
  }
}

// The frames of one event. A stream must never look complete when it is not: after an error frame the
// connection breaks off.
std::string Frames(const HttpConnection& connection, const GatewayContext& context,
                   const Answer::Event& event, const Usage& usage, AnswerFormat& format) {
  if (const auto* step = std::get_if<Answer::Step>(&event)) return format.Delta(step->delta, step->usage);
  if (std::holds_alternative<Answer::Done>(event)) return format.End(usage);
  const auto* failed = std::get_if<Answer::Failed>(&event);
  if (failed == nullptr) return ": keepalive\n\n";
  LogWarning("{} {}: the stream broke off: {}", connection.request_id(), connection.path(),
             Message(failed->status));
  return format.Failure(context.FailureOf(failed->status));
}

net::awaitable<HttpOutcome> AnswerStream(HttpConnection& connection, GatewayContext& context, Answer& answer,
                                         AnswerFormat& format) {
  bool started = false;
  while (true) {
    const Answer::Event event = co_await answer.Next(context.options.keepalive);
    if (connection.peer_gone()) {
      connection.EndAfterThis();
      co_return HttpOutcome{};
    }
    const auto* failed = std::get_if<Answer::Failed>(&event);
    if (failed != nullptr && !started) {
      HttpResponse response = FailureResponse(connection, context.FailureOf(failed->status));
      const HttpOutcome outcome{static_cast<int>(response.result_int())};
      co_await connection.Write(std::move(response));
      co_return outcome;
    }
    std::string out;
    if (!started) {
      // Until here an error could still be a plain HTTP answer.
      HttpResponse header = StreamHeader();
      if (!co_await connection.BeginStream(std::move(header))) co_return HttpOutcome{};
      started = true;
      Usage nothing_yet;
      nothing_yet.prompt_tokens = answer.usage().prompt_tokens;
      out = format.Begin(nothing_yet);
    }
    out += Frames(connection, context, event, answer.usage(), format);
    const bool written = co_await connection.WriteChunk(std::move(out));
    if (failed != nullptr) {
      connection.EndAfterThis();
      co_return HttpOutcome{context.FailureOf(failed->status).http_status};
    }
    if (!written) co_return HttpOutcome{};
    if (!std::holds_alternative<Answer::Done>(event)) continue;
    co_await connection.EndStream();
    co_return HttpOutcome{200};
  }
}

}  // namespace

HttpResponse ErrorResponse(const ApiError& error) {
  HttpResponse response;
  response.result(static_cast<unsigned>(error.http_status));
  response.set(http::field::content_type, kJsonType);
  if (error.http_status == 429 || error.http_status == 503)
    response.set(http::field::retry_after, std::to_string(error.retry_after_seconds));
  if (error.http_status >= 500 && error.http_status != 503 && error.http_status != 504)
    response.set("x-should-retry", "false");
  if (error.http_status == 401) response.set(http::field::www_authenticate, "Bearer");
  response.body() = ErrorBody(error);
  return response;
}

net::awaitable<HttpOutcome> AnswerApi(HttpConnection& connection, GatewayContext& context, Endpoint endpoint,
                                      const std::string& key) {
  auto prepared = Prepare(endpoint, connection.request().body(), context);
  if (!prepared.ok()) {
    HttpResponse response = FailureResponse(connection, prepared.error());
    const HttpOutcome refused{static_cast<int>(response.result_int())};
    co_await connection.Write(std::move(response));
    co_return refused;
  }
  const ApiRequest& request = *prepared->request;
  context.unknown_fields.Note(request.unknown_fields);
  ++context.requests_running;
  const auto answer = Answer::Start(connection.executor(), context.ForAnswers(), request, key,
                                    context.DeadlineOf(request), TraceOf(connection.request()));
  const uint64_t stop = context.AddAnswerStop(connection.executor(), answer, request.id);
  connection.WatchPeer([answer] { answer->Cancel(Cancelled("the client went away")); });
  HttpOutcome outcome;
  if (request.stream) {
    outcome = co_await AnswerStream(connection, context, *answer, *prepared->format);
  } else {
    outcome = co_await AnswerWhole(connection, context, *answer, *prepared->format);
  }
  answer->Cancel(Cancelled("the answer is over"));
  context.answer_stops.Remove(stop);
  co_await connection.StopWatching();
  --context.requests_running;
  co_return outcome;
}

}  // namespace millrace::server
