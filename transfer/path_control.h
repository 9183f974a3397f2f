#pragma once
// What is decided for one path: whether it is trusted, how much it may carry, when it is late. Policy over
// the mechanism in path.h; clock and randomness come from outside. Transfer thread only.
//
//   down --Connect--> connecting --connected--> probation --answers--> up <--late / answer in time--> suspect
//     ^                                                                                                  |
//     +------------- broken, refused to connect, or silent while the peer is heard elsewhere ------------+
//
// A suspect path gets nothing new; what is late on it is sent again elsewhere. A path that lives but is slow
// is heard from again and is measured anew. A path that says nothing while the peer speaks on another is
// disconnected: that makes its slices terminal, so that others can have them. One outage is one trip, however
// many errors it brings. A path that came back carries an eighth of its share and doubles it with each slice
// that arrives in time.

#include <memory>
#include <string>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "base/random.h"
#include "transfer/path.h"
#include "transfer/path_meter.h"

namespace millrace::transfer {

enum class PathState { kDown, kConnecting, kProbation, kUp, kSuspect };
const char* Name(PathState state);

class PathControl {
 public:
  // A slice on this path.
  struct Sent {
    TimePoint at;
    TimePoint late_at;
    uint64_t queued = 0;  // bytes under way when it was sent, itself included
    uint64_t bytes = 0;
    uint32_t attempt = 0;
    bool late = false;
    bool express = false;
    bool trial = false;   // see DueForTrial
    bool passes = false;  // bulk that was sent before: what it took says nothing of the rate
  };

  // `options` and `clock` outlive it.
  PathControl(std::unique_ptr<Path> path, const Options* options, std::string peer_name, uint64_t seed);

  const PathTraits& traits() const { return path_->traits(); }
  Path* path() const { return path_.get(); }
  PathState state() const { return state_; }
  bool connected() const { return state_ >= PathState::kProbation; }
  TimePoint last_heard() const { return last_heard_; }
  uint64_t bytes_in_flight() const { return bytes_in_flight_; }
  TimePoint next_late() const { return next_late_; }
  Duration delay() const { return meter_.delay(); }
  double bytes_per_second() const { return meter_.bytes_per_second(); }

  // Scheduling.
  // `express`: for such a slice; a few pass bulk that fills the window. `desperate`: nothing better is there,
  // and a suspect path will do.
  bool HasRoom(bool express, bool desperate = false) const;
  uint64_t SliceBytes() const;                  // what it carries in about slice_time
  Duration Predict(uint64_t more_bytes) const;  // until an answer to that many bytes, sent now; with cost
  // It is up and was faster once, but what it was measured at has kept it from being given anything for a
  // while: only a slice can show whether that still holds.
  bool DueForTrial(TimePoint now) const;
  void Send(TimePoint now, const Slice& slice);
  bool Carries(uint64_t slice) const { return in_flight_.contains(slice); }
  // Slices that have become late since the last call. The path is suspect from then on.
  std::vector<uint64_t> TakeLate(TimePoint now);
  void CountHedge(uint64_t bytes);

  // What the path reported.
  void OnConnected(TimePoint now);
  void OnBroken(TimePoint now, const Status& why);
  uint32_t OnSliceDone(TimePoint now, uint64_t slice, SliceOutcome outcome);  // which copy it was
  void OnProbeDone(TimePoint now, uint64_t probe);

  // Connects, probes, gives up. `peer_heard`: when the peer was last heard on any other path. Says when it
  // wants to be called again at the latest.
  TimePoint Tick(TimePoint now, TimePoint peer_heard);
  void Close();  // for good
  PathSnapshot Describe() const;

 private:
  void Down(TimePoint now, const Status& why);
  void MoveTo(PathState state, TimePoint now);
  void Suspect(TimePoint now, const char* why);
  void Trusted(TimePoint now);
  void SendProbe(TimePoint now);
  Duration ProbePatience() const;
  uint64_t Window() const;
  TimePoint TickConnected(TimePoint now, TimePoint peer_heard);

  const std::unique_ptr<Path> path_;
  const Options* const options_;
  const std::string peer_name_;
  Random jitter_;
  PathMeter meter_;

  PathState state_ = PathState::kDown;
  TimePoint state_since_{};
  TimePoint retry_at_{};
  Duration backoff_{};
  TimePoint sound_since_{};  // up, or suspect for a moment
  bool tripped_ = false;     // in an outage: not up again since
  bool closed_ = false;
  double share_ = 1;  // of the window, in probation
  int32_t bad_checksums_ = 0;
  std::string reason_;
  TimePoint last_sent_{};
  TimePoint last_heard_{};
  TimePoint heard_[2]{};  // by bulk and probes, by express

  absl::flat_hash_map<uint64_t, Sent> in_flight_;
  uint64_t bytes_in_flight_ = 0;
  uint64_t express_in_flight_ = 0;     // of these
  TimePoint next_late_ = kNoDeadline;  // no later than the first slice's late_at
  uint64_t probe_ = 0;                 // outstanding; 0 = none
  uint64_t next_probe_ = 1;
  TimePoint probe_sent_{};
  bool probe_alone_ = false;

  uint64_t bytes_done_ = 0;
  uint64_t slices_done_ = 0;
  uint64_t slices_resent_ = 0;
  uint64_t slices_hedged_ = 0;
  uint64_t bytes_hedged_ = 0;
  uint64_t trips_ = 0;
};

}  // namespace millrace::transfer
