#pragma once
// Chat and completion requests over HTTP, from the body to the last byte of the answer.

#include <boost/asio/awaitable.hpp>

#include "server/gateway/gateway_context.h"
#include "server/gateway/http_connection.h"

namespace millrace::server {

// What the answer said, for counting. 0: the client was gone before there was one.
struct HttpOutcome {
  int status = 0;
};

// Answers the connection's current request, which came with the API key called `key`. On the connection's
// strand. `stop` in the context's answer_stops ends it; so does a client that leaves.
boost::asio::awaitable<HttpOutcome> AnswerApi(HttpConnection& connection, GatewayContext& context,
                                              Endpoint endpoint, const std::string& key);

// An error as a whole answer, with the fields that tell clients whether to try again.
HttpResponse ErrorResponse(const ApiError& error);

}  // namespace millrace::server
