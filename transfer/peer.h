#pragma once
// One remote process: its queue and the paths that serve it. The scheduler: which path takes the next slice,
// what is sent twice, and when the peer is lost. Transfer thread only; the clock comes from outside.
//
// Late binding: a slice is cut only for a path that has room now, and the path that would finish it first
// takes it. A slow path takes none that the others would be done with sooner (the tail of a transfer). A
// slice that is late is sent again on another path; the first good copy counts, and the request ends when
// every copy is terminal.

#include <memory>
#include <vector>

#include "transfer/path_control.h"
#include "transfer/slice_queue.h"

namespace millrace::transfer {

class Peer : public PathOwner {
 public:
  // `options` and `clock` outlive it. `seed`: for jitter.
  Peer(PeerId id, uint64_t epoch, std::string name, const Options* options, const Clock* clock,
       uint64_t seed);
  ~Peer() override;

  void AddPath(std::unique_ptr<Path> path);
  SliceQueue& queue();
  uint64_t epoch() const { return epoch_; }
  const std::string& name() const { return name_; }

  // Queues a request and sends what can be sent.
  void Add(const Request& request, std::shared_ptr<IntentList> intents, RequestDone done);
  // Deadlines, late slices, health. When the peer is lost its requests fail and lost() turns true. Says when
  // it wants to be called again at the latest.
  TimePoint Tick(TimePoint now);
  bool lost() const { return !lost_.ok(); }
  // Lost, and every copy of its slices is terminal: it may be destroyed without waiting for anything.
  bool drained() const { return lost() && queue_.num_requests() == 0; }
  // Ends every request with `status` and closes every path.
  void Lose(const Status& status);
  void Describe(std::vector<PathSnapshot>* out) const;

  void OnConnected(Path* path) override;
  void OnBroken(Path* path, const Status& why) override;
  void OnSliceDone(Path* path, uint64_t slice, SliceOutcome outcome) override;
  void OnProbeDone(Path* path, uint64_t probe) override;
  void OnRefused(const Status& why) override {
    refusal_ = why;
    touched_ = true;
  }

 private:
  PathControl& Find(Path* path);
  TimePoint TickNow(TimePoint now);
  TimePoint TickPaths(TimePoint now);
  void Touch();  // something happened: sends what can be sent, and the next tick is not skipped
  void Pump();
  PathControl* BestPath(bool express, const PathControl* except);
  bool WorthTaking(TimePoint now, const PathControl& path) const;
  void Hedge(TimePoint now);
  bool HedgeOne(TimePoint now, PathControl& late, uint64_t slice);

  const PeerId id_;
  const uint64_t epoch_;
  const std::string name_;
  const Options* const options_;
  const Clock* const clock_;
  Random seeds_;
  const TimePoint created_;
  SliceQueue queue_;
  std::vector<std::unique_ptr<PathControl>> paths_;
  // Late slices that no path could take yet: on which path, and the slice.
  std::vector<std::pair<PathControl*, uint64_t>> to_hedge_;
  uint64_t bytes_sent_ = 0;
  uint64_t bytes_hedged_ = 0;
  bool touched_ = true;  // since the last tick
  TimePoint next_tick_{};
  bool pumping_ = false;  // also while paths are ticked: what they report is acted upon afterwards
  Status refusal_;        // a path was told that this is another process
  Status lost_;
};

}  // namespace millrace::transfer
