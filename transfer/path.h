#pragma once
// The seam between the queue of a peer and a way to it. Transfer thread only.

#include <functional>
#include <string>

#include "transfer/slice_queue.h"

namespace millrace::transfer {

// What a path tells its peer. `kPathFailed`: the slice may or may not have landed and nothing of it is being
// sent any more; another path may take it.
enum class SliceOutcome { kLanded, kBadChecksum, kRefused, kPathFailed };

struct PathEvents {
  std::function<void(const Slice&, SliceOutcome)> slice_done;
  std::function<void()> has_room;              // came up, or a slice became terminal
  std::function<void(const Status&)> refused;  // the other side says that it is not who we look for
};

class Path {
 public:
  virtual ~Path() = default;
  virtual bool HasRoom() const = 0;    // up, and its window is open
  virtual void Send(Slice slice) = 0;  // HasRoom() must be true
  virtual bool up() const = 0;
  virtual TimePoint last_heard() const = 0;  // any sign of life from the peer
  // Connects again, beats, gives up on overdue slices. Says when it wants to be called again at the latest.
  virtual TimePoint Tick(TimePoint now) = 0;
  // Closes for good. Slices in flight are reported as kPathFailed before it returns; nothing is reported
  // after.
  virtual void Close() = 0;
  virtual PathSnapshot Describe() const = 0;
};

// Bandwidth over busy time and the delay of slices that did not queue, kept apart; never fed by failures.
class PathMeter {
 public:
  void Sent(TimePoint now, uint64_t bytes_in_flight_before) {
    if (bytes_in_flight_before == 0) busy_since_ = now;
  }
  void Landed(TimePoint now, TimePoint sent, uint64_t bytes, bool alone, uint64_t bytes_in_flight_after);
  void Interrupted() { busy_bytes_ = 0; }
  void Fill(PathSnapshot* snapshot) const;

 private:
  TimePoint busy_since_{};
  uint64_t busy_bytes_ = 0;
  double bytes_per_second_ = 0;
  double delay_seconds_ = 0;
  uint64_t bytes_done_ = 0;
  uint64_t slices_done_ = 0;
};

}  // namespace millrace::transfer
