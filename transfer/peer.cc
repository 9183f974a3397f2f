#include "transfer/peer.h"

#include <algorithm>

#include "base/check.h"

namespace millrace::transfer {
namespace {

// Copies of late slices, at most: this much, and this part of everything sent.
constexpr uint64_t kHedgeBytesFree = 8 << 20;
constexpr double kHedgePart = 0.05;

// A peer that was lost may be opened again, while its side still has connections of the time before, and with
// them what it knows of slices (landing.h). Numbers that came again would be taken for leftovers for ever, so
// each Peer of this process has its own, above those of all before it: ids of peers only grow. A peer has
// 2^40 slices.
constexpr int kSliceBits = 40;

}  // namespace

Peer::Peer(PeerId id, uint64_t epoch, std::string name, const Options* options, const Clock* clock,
           uint64_t seed)
    : id_(id),
      epoch_(epoch),
      name_(std::move(name)),
      options_(options),
      clock_(clock),
      seeds_(seed),
      created_(clock->Now()),
      queue_((uint64_t{id} << kSliceBits) + 1) {}

Peer::~Peer() {
  if (!lost()) Lose(Cancelled("the transfer engine is shutting down"));
  // With its path gone a slice is terminal, whether or not it was reported.
  pumping_ = true;
  paths_.clear();
  queue_.EndAll();
}

void Peer::AddPath(std::unique_ptr<Path> path) {
  path->Attach(this);
  paths_.push_back(std::make_unique<PathControl>(std::move(path), options_, name_, seeds_.Next()));
}

PathControl& Peer::Find(Path* path) {
  const auto found = std::find_if(paths_.begin(), paths_.end(),
                                  [path](const auto& control) { return control->path() == path; });
  MR_CHECK(found != paths_.end());
  return **found;
}

SliceQueue& Peer::queue() {
  touched_ = true;
  return queue_;
}

void Peer::Add(const Request& request, std::shared_ptr<IntentList> intents, RequestDone done) {
  queue_.Add(request.operation, request.ticket, request.priority, clock_->Now(), request.deadline,
             std::move(intents), std::move(done));
  Touch();
}

void Peer::OnConnected(Path* path) {
  Find(path).OnConnected(clock_->Now());
  Touch();
}

void Peer::OnBroken(Path* path, const Status& why) {
  Find(path).OnBroken(clock_->Now(), why);
  Touch();
}

void Peer::OnSliceDone(Path* path, uint64_t slice, SliceOutcome outcome) {
  const uint32_t attempt = Find(path).OnSliceDone(clock_->Now(), slice, outcome);
  queue_.Done(slice, attempt, outcome);
  Touch();
}

void Peer::OnProbeDone(Path* path, uint64_t probe) {
  Find(path).OnProbeDone(clock_->Now(), probe);
  Touch();
}

// Of the paths that have room, the one that would answer a small slice first.
PathControl* Peer::BestPath(bool express, const PathControl* except) {
  const bool desperate = std::none_of(paths_.begin(), paths_.end(), [](const auto& path) {
    return path->traits().carries_slices &&
           (path->state() == PathState::kUp || path->state() == PathState::kProbation);
  });
  PathControl* best = nullptr;
  Duration best_time{};
  for (const auto& path : paths_) {
    if (path.get() == except || !path->HasRoom(express, desperate)) continue;
    const Duration time = path->Predict(options_->slice_bytes_min);
    if (best == nullptr || time < best_time) {
      best = path.get();
      best_time = time;
    }
  }
  return best;
}

// Whether the paths that are full now, with all that waits, would still be at work when this one could be
// done with its slice. Only full ones count: their answers will make room, so that waiting for them ends.
bool Peer::WorthTaking(TimePoint now, const PathControl& path) const {
  if (path.DueForTrial(now)) return true;
  double rate = 0;
  uint64_t bytes = queue_.bytes_waiting();
  Duration delay = Duration::max();
  for (const auto& other : paths_) {
    if (other.get() == &path || other->state() != PathState::kUp || other->bytes_in_flight() == 0 ||
        other->HasRoom(queue_.NextIsExpress()))
      continue;
    if (other->bytes_per_second() == 0) return true;  // nothing is known to be better
    rate += other->bytes_per_second() / other->traits().cost;
    bytes += other->bytes_in_flight();
    delay = std::min(delay, other->delay());
  }
  if (rate == 0) return true;
  const auto theirs = Duration(static_cast<int64_t>(static_cast<double>(bytes) / rate * 1e9));
  return path.Predict(std::min(path.SliceBytes(), queue_.bytes_waiting())) <= theirs + delay;
}

void Peer::Touch() {
  touched_ = true;
  Pump();
}

void Peer::Pump() {
  if (pumping_ || lost()) return;
  pumping_ = true;
  const TimePoint now = clock_->Now();
  if (!to_hedge_.empty()) Hedge(now);
  while (queue_.HasWork()) {
    PathControl* const path = BestPath(queue_.NextIsExpress(), nullptr);
    // The best of those that have room; if even that is not worth it, faster ones will have room in time.
    if (path == nullptr || !WorthTaking(now, *path)) break;
    const Slice slice = queue_.Take(path->SliceBytes());
    bytes_sent_ += slice.local.size();
    path->Send(now, slice);
  }
  pumping_ = false;
}

void Peer::Hedge(TimePoint now) {
  std::erase_if(to_hedge_, [&](const auto& entry) { return HedgeOne(now, *entry.first, entry.second); });
}

// True when there is nothing left to do for it.
bool Peer::HedgeOne(TimePoint now, PathControl& late, uint64_t id) {
  if (!late.traits().overtakes || !late.Carries(id) || !queue_.Wanted(id)) return true;
  const auto allowed = kHedgeBytesFree + static_cast<uint64_t>(kHedgePart * static_cast<double>(bytes_sent_));
  if (bytes_hedged_ >= allowed) return true;
  PathControl* const path = BestPath(false, &late);
  if (path == nullptr) return false;
  if (path->Carries(id)) return true;
  const Slice slice = queue_.Copy(id);
  bytes_hedged_ += slice.local.size();
  late.CountHedge(slice.local.size());
  path->Send(now, slice);
  return true;
}

TimePoint Peer::Tick(TimePoint now) {
  if (lost()) return kNoDeadline;
  if (!touched_ && now < next_tick_) return next_tick_;
  next_tick_ = TickNow(now);
  touched_ = false;
  return next_tick_;
}

TimePoint Peer::TickNow(TimePoint now) {
  for (const auto& path : paths_) {
    for (const uint64_t slice : path->TakeLate(now)) to_hedge_.emplace_back(path.get(), slice);
  }
  TimePoint next = TickPaths(now);
  const bool any =
      std::any_of(paths_.begin(), paths_.end(), [](const auto& path) { return path->connected(); });
  TimePoint heard = created_;
  for (const auto& path : paths_) heard = std::max(heard, path->last_heard());
  if (!refusal_.ok()) {
    Lose(refusal_);
  } else if (!any && now - heard > options_->peer_timeout) {
    Lose(Unavailable("the peer is lost: no path to it is up and nothing was heard for {:.1f} s",
                     Seconds(now - heard)));
  }
  if (lost()) return kNoDeadline;
  queue_.FailExpired(now);
  touched_ = false;
  Pump();
  if (touched_) next = TickPaths(now);  // sending has changed a path, or broken it
  for (const auto& path : paths_) next = std::min(next, path->next_late());
  if (!any) next = std::min(next, heard + options_->peer_timeout + std::chrono::milliseconds(1));
  return std::min(next, queue_.NextDeadline());
}

TimePoint Peer::TickPaths(TimePoint now) {
  // The two that were heard last: each path's silence is judged by the other paths.
  TimePoint last{}, second{};
  for (const auto& path : paths_) {
    const TimePoint heard = path->last_heard();
    if (heard > last) {
      second = std::exchange(last, heard);
    } else {
      second = std::max(second, heard);
    }
  }
  TimePoint next = kNoDeadline;
  const bool was_pumping = std::exchange(pumping_, true);
  for (const auto& path : paths_)
    next = std::min(next, path->Tick(now, path->last_heard() == last ? second : last));
  pumping_ = was_pumping;
  return next;
}

void Peer::Lose(const Status& status) {
  lost_ = status;
  queue_.FailAll(status);
  // Slices in flight come back from here and end their requests.
  for (const auto& path : paths_) path->Close();
}

void Peer::Describe(std::vector<PathSnapshot>* out) const {
  for (const auto& path : paths_) {
    out->push_back(path->Describe());
    out->back().peer = id_;
  }
}

}  // namespace millrace::transfer
