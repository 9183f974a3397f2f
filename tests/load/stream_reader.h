#pragma once
// Reads one streamed completion as its bytes come, at little cost: thousands of these share a thread.

#include <functional>
#include <string>
#include <string_view>

namespace millrace {

// One thread at a time. Knows HTTP/1.1's chunked coding, lines of server-sent events, and of their JSON the
// member "text", whose value must need no unescaping.
class StreamReader {
 public:
  using OnText = std::function<void(std::string_view text)>;
  void Push(std::string_view bytes, const OnText& on_text);

  int status() const { return status_; }             // 0 before the status line
  bool done() const { return saw_done_ && ended_; }  // [DONE], and the last chunk after it
  // What is not an answer: another status, an error frame, bytes that break the coding. Empty if nothing.
  const std::string& error() const { return error_; }

 private:
  enum class State { kHeader, kSize, kData, kDataEnd };
  void OnHeader();
  void OnSize();
  void OnBody(std::string_view bytes, const OnText& on_text);
  void OnLine(std::string_view line, const OnText& on_text);

  State state_ = State::kHeader;
  std::string pending_;  // header, or one line of the coding
  size_t chunk_left_ = 0;
  std::string line_;  // of the body, the part that came
  int status_ = 0;
  bool saw_done_ = false;
  bool ended_ = false;
  std::string error_;
};

}  // namespace millrace
