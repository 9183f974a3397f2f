// Bodies of chat, completions and responses: refused with a 4xx that has a message, or a request that keeps
// its promises.
#include <fuzzer/FuzzedDataProvider.h>

#include "engine/grammar/constraint.h"
#include "server/gateway/api_request.h"
#include "server/gateway/responses_body.h"

using namespace millrace;
using namespace millrace::server;

namespace {

void Check(const ApiRequest& request, const ModelInfo& model, const engine::Tokenizer& tokenizer) {
  const engine::SamplingParams& sampling = request.sampling;
  const bool sane = request.n >= 1 && !request.prompts.empty() && request.num_choices() <= kChoicesMax &&
                    sampling.temperature >= 0 && sampling.top_p > 0 && sampling.top_p <= 1 &&
                    sampling.top_k >= 0 && sampling.repetition_penalty > 0 && sampling.max_tokens >= 1 &&
                    sampling.num_logprobs <= 20;
  if (!sane) __builtin_trap();
  for (const std::vector<int32_t>& prompt : request.prompts) {
    if (prompt.empty() || static_cast<int32_t>(prompt.size()) >= model.context_max) __builtin_trap();
    for (const int32_t token : prompt) {
      if (token < 0 || token >= tokenizer.size()) __builtin_trap();
    }
  }
  for (const std::string& stop : request.stop) {
    if (stop.empty()) __builtin_trap();
  }
  // Workers compile it again, and have nobody to tell.
  if (!sampling.constraint.empty() && !engine::BuildGrammar(sampling.constraint).ok()) __builtin_trap();
}

int CheckError(const ApiError& error) {
  if (error.http_status < 400 || error.http_status > 499 || error.message.empty()) __builtin_trap();
  return 0;
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* bytes, size_t size) {
  static const auto tokenizer =
      *engine::Tokenizer::Load(std::string(MILLRACE_SOURCE_DIR) + "/deploy/models/ling-tiny");
  static const ModelInfo model = {.name = "m", .context_max = 2048};
  FuzzedDataProvider data(bytes, size);
  const int kind = data.ConsumeIntegralInRange(0, 2);
  const Endpoint endpoint = kind == 0 ? Endpoint::kCompletions : Endpoint::kChat;
  std::string body = data.ConsumeRemainingBytesAsString();
  if (kind == 2) {
    const auto chat = ChatBodyOf(body);
    if (!chat.ok()) return CheckError(chat.error());
    body = DumpJson(*chat);
  }
  const auto parsed = ParseApiRequest(endpoint, body, model, *tokenizer);
  if (!parsed.ok()) return CheckError(parsed.error());
  Check(*parsed, model, *tokenizer);
  return 0;
}
