#pragma once
// One TCP connection between two transfer engines, either end: a Hello each way, then frames. Payload goes
// from user memory to the socket and from the socket to where its handler says, without a copy in between:
// bulk is read into place, with room for the next header behind it, so that a slice costs about one system
// call; only frames that follow small ones are read through a buffer. Transfer thread only.

#include <array>
#include <deque>
#include <span>
#include <string>
#include <vector>

#include "transfer/event_loop.h"
#include "transfer/tcp/socket.h"
#include "transfer/wire.h"

namespace millrace::transfer {

class FrameStream {
 public:
  class Handler {
   public:
    virtual ~Handler() = default;
    virtual void OnConnected() = 0;  // a socket that was connecting has done so
    // The other side's Hello, serialised. False: the stream is of no use (the handler has closed it, or
    // will).
    virtual bool OnHello(std::string_view message) = 0;
    // Where the payload of this frame belongs; null: nowhere, it is read and dropped.
    virtual std::byte* OnHeader(const Frame& frame) = 0;
    // The whole frame is here. `right`: the payload's checksum is the header's.
    virtual void OnFrame(const Frame& frame, bool right) = 0;
    // Of a frame with kControl payload.
    virtual void OnMessage(std::string_view body) = 0;
    // All of the payload of a frame that was sent with `owned` has left user memory.
    virtual void OnSent(const Frame& frame) = 0;
    // Some payload has arrived, for those who watch progress.
    virtual void OnProgress(size_t bytes) = 0;
    // The connection broke. The stream is closed; the handler may destroy it later, not from here.
    virtual void OnClosed(const Status& why) = 0;
  };

  // `connecting`: the socket is not connected yet. `loop` and `handler` outlive the stream.
  FrameStream(EventLoop* loop, UniqueFd fd, bool connecting, Handler* handler);
  ~FrameStream() { Close(); }

  void SendHello(const std::string& message);
  // `payload` stays valid until OnSent or Close; its checksum is filled in.
  void Send(const Frame& frame, std::span<const std::byte> payload = {});
  void SendMessage(const std::string& body);  // a control frame; copied
  // Nothing reads or writes user memory after this. No OnClosed.
  void Close();
  // Closes when all that is queued has been sent.
  void CloseAfterSending() { leaving_ = true; }
  bool closed() const { return !fd_.valid(); }
  // The payload being read goes nowhere from now on.
  void DropPayload() { target_ = nullptr; }
  size_t bytes_queued() const { return bytes_queued_; }
  void Flush();  // what the socket takes, up to a round's budget; the loop does the rest

 private:
  enum class State { kConnecting, kHello, kHeader, kPayload };
  struct Outgoing {
    Frame frame;
    HeaderBytes header{};  // of a frame; made, with the checksum, when its turn comes: the payload is read
    bool ready = false;    // twice in a row then, the second time from the cache
    std::string text;      // or a Hello or control message, whole
    std::span<const std::byte> payload;
  };

  void OnReady(uint32_t events);
  void Read();
  bool ReadOnce(size_t* budget);
  // Takes what it can of `bytes`; how many.
  size_t Consume(std::span<const std::byte> bytes);
  void ConsumeHello();
  void BeginPayload();
  void EndPayload();
  void Fail(const Status& why);
  void WantEvents();

  EventLoop* const loop_;
  Handler* const handler_;
  UniqueFd fd_;
  State state_;
  uint32_t events_ = 0;
  bool leaving_ = false;
  bool reading_ = false;

  // In.
  std::vector<std::byte> buffer_;  // read ahead; its use is [begin_, end_)
  size_t begin_ = 0, end_ = 0;
  std::string hello_;
  Frame frame_;
  std::byte* target_ = nullptr;  // of the payload; null: dropped
  std::string message_;          // control payload
  uint32_t received_ = 0;        // of the payload
  uint32_t crc_ = 0;
  uint32_t last_length_ = 0;  // of the frame before: small ones are read through the buffer

  // Out.
  std::deque<Outgoing> out_;
  size_t out_offset_ = 0;  // of out_.front() that is written
  size_t bytes_queued_ = 0;
};

}  // namespace millrace::transfer
