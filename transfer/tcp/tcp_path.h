#pragma once
// The sending end of one connection to a rail of a peer: connects, says Hello, sends slices from user memory,
// takes answers, and connects again when it breaks. Transfer thread only.

#include <deque>
#include <string>

#include "base/net.h"
#include "base/random.h"
#include "transfer/event_loop.h"
#include "transfer/path.h"
#include "transfer/tcp/socket.h"

namespace millrace::transfer {

class TcpPath : public Path {
 public:
  enum class Purpose { kControl, kData };  // the control session carries only heartbeats
  struct Target {
    std::string local_host;  // numeric; empty: any
    HostPort remote;
    uint64_t own_epoch = 0;
    uint64_t expected_epoch = 0;
    Purpose purpose = Purpose::kData;
  };
  // `loop` and `options` outlive the path.
  TcpPath(EventLoop* loop, const Options* options, Target target, PathEvents events);
  ~TcpPath() override { Close(); }

  bool HasRoom() const override;
  void Send(Slice slice) override;
  bool up() const override { return state_ == State::kUp; }
  TimePoint last_heard() const override { return last_heard_; }
  TimePoint Tick(TimePoint now) override;
  void Close() override;
  PathSnapshot Describe() const override;

 private:
  enum class State { kDown, kConnecting, kHello, kUp, kClosed };
  struct Outgoing {
    HeaderBytes header;
    std::span<const std::byte> payload;
  };
  struct InFlight {
    Slice slice;
    TimePoint sent;
    bool alone = false;
  };

  void Connect(TimePoint now);
  void OnReady(uint32_t events);
  void SendHello();
  bool ReadHello();  // false: the connection has failed or waits for more
  void ReadFrames();
  void OnFrame(const Frame& frame);
  void OnAnswer(const Frame& frame);
  void Flush();
  void Fail(const Status& status);  // this connection is over; another follows after a pause
  void DropConnection();
  void Enqueue(const Frame& frame, std::span<const std::byte> payload);

  EventLoop* const loop_;
  const Options* const options_;
  const Target target_;
  const PathEvents events_;
  State state_ = State::kDown;
  UniqueFd fd_;
  TimePoint state_since_{};
  TimePoint retry_at_{};
  Duration backoff_{};
  Random jitter_;
  TimePoint last_heard_{};
  TimePoint last_beat_{};
  bool writable_wanted_ = false;
  std::string hello_in_;
  HeaderBytes header_in_{};
  size_t header_in_size_ = 0;
  std::deque<Outgoing> out_;
  size_t out_offset_ = 0;  // of out_.front() that is written
  absl::flat_hash_map<uint64_t, InFlight> in_flight_;
  uint64_t bytes_in_flight_ = 0;
  uint64_t slices_resent_ = 0;
  int32_t bad_checksums_ = 0;  // in a row
  bool logged_down_ = false;   // one line per outage
  PathMeter meter_;
};

}  // namespace millrace::transfer
