#pragma once
// One remote process: its queue and the paths that serve it. Transfer thread only.

#include <memory>
#include <vector>

#include "transfer/path.h"
#include "transfer/slice_queue.h"

namespace millrace::transfer {

class Peer {
 public:
  Peer(PeerId id, uint64_t epoch, SliceQueue queue, Duration timeout)
      : id_(id),
        epoch_(epoch),
        queue_(std::move(queue)),
        timeout_(timeout),
        created_(Clock::System().Now()) {}
  ~Peer();

  // Paths report through these.
  PathEvents Events();
  void AddPath(std::unique_ptr<Path> path) { paths_.push_back(std::move(path)); }

  SliceQueue& queue() { return queue_; }
  uint64_t epoch() const { return epoch_; }

  // Hands slices to paths that have room, until either runs out.
  void Pump();
  // Ticks paths and deadlines. When the peer is lost its writes fail and lost() turns true.
  TimePoint Tick(TimePoint now);
  bool lost() const { return !lost_.ok(); }
  // Ends every write with `status` and closes every path.
  void Lose(const Status& status);
  void Describe(std::vector<PathSnapshot>* out) const;

 private:
  void OnSliceDone(const Slice& slice, SliceOutcome outcome);

  const PeerId id_;
  const uint64_t epoch_;
  SliceQueue queue_;
  const Duration timeout_;
  const TimePoint created_;
  std::vector<std::unique_ptr<Path>> paths_;
  bool pumping_ = false;
  Status refusal_;  // a path was told that this is another process
  Status lost_;
};

}  // namespace millrace::transfer
