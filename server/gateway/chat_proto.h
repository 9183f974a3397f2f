#pragma once
// Between the messages of chat.proto and what the gateway works with. A request becomes the body that HTTP
// would have brought, so that both are checked by one parser and refused in the same words.

#include <string>
#include <vector>

#include "base/json.h"
#include "engine/tokenizer/tokenizer.h"
#include "proto/chat.pb.h"
#include "server/gateway/answer.h"
#include "server/gateway/api_error.h"
#include "server/gateway/api_request.h"

namespace millrace::server {

// What ParseApiRequest is to read, and as which endpoint. A BadRequest where a JSON text inside is none, or
// where there is nothing to answer.
struct ChatBody {
  Endpoint endpoint = Endpoint::kChat;
  std::string text;
};
ApiResult<ChatBody> ChatBodyOf(const v1::CompleteRequest& request);

// Writes the answer to one request. Everything borrowed outlives it. One thread at a time.
class ChatProtoFormat {
 public:
  ChatProtoFormat(const ApiRequest& request, const ModelInfo& model, const engine::Tokenizer& tokenizer,
                  int64_t created)
      : request_(request),
        model_(model),
        tokenizer_(tokenizer),
        created_(created),
        begun_(static_cast<size_t>(request.num_choices())) {}

  // Everything but choices.
  v1::CompleteResponse Envelope(const Usage& usage) const;
  // Adds what came to `choice`, which holds what came before (a whole answer) or nothing (a stream).
  void Append(const ChoiceDelta& delta, v1::Choice* choice);

 private:
  void AppendTokens(const ChoiceDelta& delta, v1::Choice* choice) const;

  const ApiRequest& request_;
  const ModelInfo& model_;
  const engine::Tokenizer& tokenizer_;
  const int64_t created_;
  std::vector<bool> begun_;  // per choice
};

}  // namespace millrace::server
