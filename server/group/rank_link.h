#pragma once
// What two ranks tell each other: every message once and in order, over one connection after another. When a
// way between them is cut, the rank that dials takes another one, and both go on where they were: each keeps
// what it has said until the other one has acknowledged it, and each says, when they meet again, how much it
// has taken. The end of the other process ends the link at once.

#include <cstdint>
#include <deque>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "base/clock.h"
#include "server/group/rank_connection.h"

namespace millrace::server {

// The thread of the connections, except where said.
class RankLink {
 public:
  explicit RankLink(uint64_t session) : session_(session) {}

  uint64_t session() const { return session_; }  // names this link on both sides

  // Any thread; never blocks. Without a connection it waits for the next one. A peer that acknowledges too
  // little for too long loses the link.
  void Send(const group::GroupMessage& message);
  // Any thread. The link is over; whoever looks after it finds that in over(), or at its connection's end.
  void Close(const std::string& why);

  // Goes on over this connection: the first message that comes over it is the other side's number `next`,
  // which has taken `heard` of this side's. `sure`: the other side uses the connection too. Else that shows
  // when something has come over it; until then its end says nothing, and those before it, one of which the
  // other side may still use, stay open. False: there is no such place to go on from.
  bool Attach(std::shared_ptr<RankConnection> connection, uint64_t next, uint64_t heard, bool sure,
              TimePoint now);
  bool Uses(const RankConnection* connection) const;
  // A message has come over the connection in use. False: it has been taken before.
  bool Take(TimePoint now);
  // A connection has ended. True if that is the link's end too.
  bool Ended(const RankConnection* connection, const std::string& why, bool by_peer);
  uint64_t taken() const { return taken_; }
  // The other side has taken that many of this side's messages; false if that cannot be.
  bool Acknowledge(uint64_t heard);
  uint64_t acknowledged() const;  // what the next connection begins with
  // Who dials numbers its attempts to go on; who answers takes none that is older than the last.
  uint64_t NextAttempt() { return ++attempt_; }
  bool IsNewAttempt(uint64_t attempt) {
    if (attempt <= attempt_) return false;
    attempt_ = attempt;
    return true;
  }

  // Nothing has come, or nothing has been acknowledged, for longer than `max`; or there is no connection.
  bool Quiet(TimePoint now, Duration max) const;
  bool over() const;
  std::string why() const;

 private:
  struct Frame {
    std::string bytes;
    TimePoint since;
  };

  void DropBefore();  // with mutex_

  const uint64_t session_;
  uint64_t attempt_ = 0;
  uint64_t taken_ = 0;
  uint64_t skip_ = 0;  // of what comes next, that was taken before over another connection
  bool sure_ = false;
  TimePoint heard_;
  TimePoint attached_;

  mutable std::mutex mutex_;  // guards what follows
  std::shared_ptr<RankConnection> connection_;
  std::vector<std::shared_ptr<RankConnection>> before_;  // not in use here
  std::deque<Frame> unacknowledged_;
  size_t unacknowledged_bytes_ = 0;
  uint64_t acknowledged_ = 0;  // messages before unacknowledged_.front()
  bool over_ = false;
  std::string why_;
};

}  // namespace millrace::server
