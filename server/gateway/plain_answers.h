#pragma once
// Answers that need no worker: lists, health, token counting.

#include <string>

#include "server/gateway/api_error.h"
#include "server/gateway/gateway_context.h"

namespace millrace::server {

struct PlainAnswer {
  std::string body;
  const char* content_type = "application/json";
};

// Each answers one route; any thread, quick.
ApiResult<PlainAnswer> ListModels(GatewayContext& context);
ApiResult<PlainAnswer> DescribeOneModel(GatewayContext& context, const std::string& id);
ApiResult<PlainAnswer> Live(GatewayContext& context);
ApiResult<PlainAnswer> Ready(GatewayContext& context);
// Ready, and how many workers of each role are.
ApiResult<PlainAnswer> Health(GatewayContext& context);
ApiResult<PlainAnswer> MetricsText(GatewayContext& context);
ApiResult<PlainAnswer> Version(GatewayContext& context);
ApiResult<PlainAnswer> Load(GatewayContext& context);
// The model, the limits and the defaults that are in force.
ApiResult<PlainAnswer> Info(GatewayContext& context);
// The web page, and the description of the API.
ApiResult<PlainAnswer> WebPage(GatewayContext& context);
ApiResult<PlainAnswer> OpenApi(GatewayContext& context);
// What the live view shows: workers, queues, recent requests with their phases.
ApiResult<PlainAnswer> State(GatewayContext& context);
// {"id": "chatcmpl-..."}: ends that answer.
ApiResult<PlainAnswer> Abort(GatewayContext& context, const std::string& body);
// {model, prompt | messages, add_special_tokens} -> {tokens, count, max_model_len}
ApiResult<PlainAnswer> Tokenize(GatewayContext& context, const std::string& body);
// {model, tokens} -> {prompt}
ApiResult<PlainAnswer> Detokenize(GatewayContext& context, const std::string& body);
// A chat body -> {prompt}: the text that the model would read.
ApiResult<PlainAnswer> ApplyTemplate(GatewayContext& context, const std::string& body);

}  // namespace millrace::server
