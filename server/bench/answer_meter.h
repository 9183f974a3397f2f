#pragma once
// Reads one answer of an OpenAI-compatible server as its bytes arrive, and times its tokens.

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "base/clock.h"
#include "base/json.h"

namespace millrace::server {

// What became of a request. Kinds are kept apart in every figure; only kNone counts as served.
enum class RequestError {
  kNone,
  kConnect,     // no connection
  kHttp,        // an HTTP status other than 200
  kServer,      // an error inside a stream that had begun
  kBroken,      // the connection ended before the answer did
  kMalformed,   // the answer is not what the API promises
  kTimeout,     // longer than --request-timeout
  kUnfinished,  // still running when the test's grace was over, or when it was interrupted
};
const char* ErrorName(RequestError error);
inline constexpr int kNumRequestErrors = 8;

struct RequestResult {
  TimePoint intended;  // when it was due: every figure runs from here
  TimePoint sent;      // when its first byte was written
  TimePoint first;     // first token, reasoning and tool calls included; only if output_tokens > 0
  TimePoint end;       // the answer was complete, or failed
  int64_t session = 0;
  int32_t turn = 0;
  int32_t prompt_tokens = 0;  // as the server counted; 0 = it did not say
  int32_t cached_tokens = 0;
  int32_t output_tokens = 0;
  bool tokens_from_usage = false;  // else: chunks were counted
  bool tokens_per_chunk = false;   // the server said with every chunk how many tokens there are
  std::string finish_reason;
  RequestError error = RequestError::kNone;
  std::string message;           // of an error
  std::vector<int64_t> gaps_ns;  // between tokens; between chunks unless tokens_per_chunk
  bool served() const { return error == RequestError::kNone; }
};

// For one answer; one thread. Fills `result` but for intended and sent.
class AnswerMeter {
 public:
  AnswerMeter(bool is_stream, RequestResult* result) : is_stream_(is_stream), result_(result) {}

  // Bytes of a 200's body that arrived at `now`.
  void Add(std::string_view bytes, TimePoint now);
  // Another way in, for answers that say with every piece how many tokens there are by now.
  void TokensSoFar(int32_t count, TimePoint now);
  // The body is complete (`whole`) or the connection broke before.
  void End(bool whole, TimePoint now);
  bool failed() const { return result_->error != RequestError::kNone; }
  const std::string& text() const { return text_; }  // the answer's content

 private:
  void OnData(std::string_view data, TimePoint now);
  void OnChunk(const Json& chunk, TimePoint now);
  void OnWhole(TimePoint now);
  void ReadUsage(const Json& body);
  void Tokens(int32_t count, TimePoint now);
  void Fail(RequestError error, std::string message);

  const bool is_stream_;
  RequestResult* const result_;
  std::string pending_;  // of the line that is not complete; of the whole body when not streaming
  std::string text_;
  TimePoint last_{};     // the last token
  int32_t counted_ = 0;  // tokens timed so far
  bool done_ = false;
};

// The server's own words in an error body, or the beginning of the body.
std::string ErrorMessage(std::string_view body);

}  // namespace millrace::server
