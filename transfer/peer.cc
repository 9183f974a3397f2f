#include "transfer/peer.h"

namespace millrace::transfer {

Peer::~Peer() {
  if (!lost()) Lose(Cancelled("the transfer engine is shutting down"));
}

PathEvents Peer::Events() {
  PathEvents events;
  events.slice_done = [this](const Slice& slice, SliceOutcome outcome) { OnSliceDone(slice, outcome); };
  events.has_room = [this] { Pump(); };
  // Acted upon in Tick: the path that reports this is still in the middle of its work.
  events.refused = [this](const Status& status) { refusal_ = status; };
  return events;
}

void Peer::OnSliceDone(const Slice& slice, SliceOutcome outcome) {
  switch (outcome) {
    case SliceOutcome::kLanded:
      return queue_.Landed(slice);
    case SliceOutcome::kBadChecksum:
    case SliceOutcome::kPathFailed:
      return queue_.Return(slice);
    case SliceOutcome::kRefused:
      return queue_.Fail(
          slice, PermissionDenied("the receiver refused {} bytes under ticket {}: closed, unknown or not "
                                  "granted",
                                  slice.bytes.size(), slice.ticket));
  }
}

// Late binding: a slice is cut only for a path that has room for it now, and paths take turns.
void Peer::Pump() {
  if (pumping_ || lost()) return;
  pumping_ = true;
  for (bool progress = true; progress;) {
    progress = false;
    for (const auto& path : paths_) {
      if (!queue_.HasWork()) break;
      if (!path->HasRoom()) continue;
      path->Send(queue_.Take());
      progress = true;
    }
  }
  pumping_ = false;
}

TimePoint Peer::Tick(TimePoint now) {
  TimePoint next = kNoDeadline;
  TimePoint heard = created_;
  bool any_up = false;
  for (const auto& path : paths_) {
    next = std::min(next, path->Tick(now));
    heard = std::max(heard, path->last_heard());
    any_up = any_up || path->up();
  }
  if (!refusal_.ok()) {
    Lose(refusal_);
  } else if (!any_up && now - heard > timeout_) {
    Lose(Unavailable("the peer is lost: no path to it is up and nothing was heard for {:.1f} s",
                     Seconds(now - heard)));
  }
  if (lost()) return kNoDeadline;
  queue_.FailExpired(now);
  Pump();
  if (!any_up) next = std::min(next, heard + timeout_ + std::chrono::milliseconds(1));
  return std::min(next, queue_.NextDeadline());
}

void Peer::Lose(const Status& status) {
  lost_ = status;
  queue_.FailAll(status);
  // Slices in flight come back from here and end their writes.
  for (const auto& path : paths_) path->Close();
}

void Peer::Describe(std::vector<PathSnapshot>* out) const {
  for (const auto& path : paths_) {
    out->push_back(path->Describe());
    out->back().peer = id_;
  }
}

}  // namespace millrace::transfer
