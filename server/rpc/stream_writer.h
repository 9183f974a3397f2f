#pragma once
// The messages that wait to be written to one stream: gRPC takes one at a time.

#include <deque>
#include <functional>
#include <utility>

namespace millrace::server {

// One thread at a time. The queue's bound is its user's: tokens of one answer, events of one prefill.
template <typename Message>
class StreamWriter {
 public:
  // `write` starts writing a message that stays as it is until OnWritten. `finish` runs once, when Finish was
  // called and nothing is being written or queued any more.
  StreamWriter(std::function<void(const Message*)> write, std::function<void()> finish)
      : write_(std::move(write)), finish_(std::move(finish)) {}

  void Push(Message message) {
    if (finishing_) return;
    queue_.push_back(std::move(message));
    Pump();
  }
  void Finish() {
    finishing_ = true;
    Pump();
  }
  // The other side is gone: what is queued goes to nobody.
  void Discard() { queue_.clear(); }
  void OnWritten() {
    writing_ = false;
    Pump();
  }
  bool idle() const { return !writing_ && queue_.empty(); }

 private:
  void Pump() {
    if (writing_ || finished_) return;
    if (!queue_.empty()) {
      current_ = std::move(queue_.front());
      queue_.pop_front();
      writing_ = true;
      write_(&current_);
    } else if (finishing_) {
      finished_ = true;
      finish_();
    }
  }

  const std::function<void(const Message*)> write_;
  const std::function<void()> finish_;
  std::deque<Message> queue_;
  Message current_;
  bool writing_ = false;
  bool finishing_ = false;
  bool finished_ = false;
};

}  // namespace millrace::server
