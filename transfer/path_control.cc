#include "transfer/path_control.h"

#include <algorithm>

#include "base/check.h"
#include "base/log.h"

namespace millrace::transfer {
namespace {

using std::chrono::milliseconds;

// A slice is late after max(late_min, 3 x its prediction, prediction + 4 x the usual deviation).
constexpr double kLateFactor = 3;
constexpr int64_t kLateDeviations = 4;
constexpr Duration kDeviationMax = milliseconds(5);  // one disturbance must not blind the path for the next
// A suspect path that says nothing for so many late_min, while the peer speaks elsewhere, is given up.
constexpr int64_t kSilence = 2;
constexpr int64_t kProbePatience = 5;  // in late_min, at least
// Connecting: an attempt's patience, and the pauses between attempts.
constexpr Duration kConnectPatience = milliseconds(500);
constexpr Duration kBackoffMin = milliseconds(10), kBackoffMax = milliseconds(500);
constexpr Duration kSoundAfter = std::chrono::seconds(1);  // up for so long: the next outage starts anew
constexpr double kProbationShare = 1.0 / 8;
constexpr Duration kProbationProbes = milliseconds(20);  // between probes of an idle path in probation
constexpr int32_t kBadChecksumsMax = 8;
constexpr uint64_t kFirstWindowBytes = 1 << 20;
constexpr uint64_t kSliceStep = 64 << 10;

}  // namespace

const char* Name(PathState state) {
  static constexpr const char* kNames[] = {"down", "connecting", "probation", "up", "suspect"};
  return kNames[static_cast<int>(state)];
}

PathControl::PathControl(std::unique_ptr<Path> path, const Options* options, std::string peer_name,
                         uint64_t seed)
    : path_(std::move(path)),
      options_(options),
      peer_name_(std::move(peer_name)),
      jitter_(seed),
      meter_(path_->traits().bytes_per_second_hint) {}

uint64_t PathControl::SliceBytes() const {
  const double rate = meter_.bytes_per_second();
  const auto fit =
      rate == 0 ? kFirstWindowBytes / 4
                : static_cast<uint64_t>(rate * Seconds(options_->slice_time)) / kSliceStep * kSliceStep;
  return std::min<uint64_t>(std::clamp<uint64_t>(fit, options_->slice_bytes_min, options_->slice_bytes_max),
                            traits().slice_bytes_max);
}

// Twice what is under way on a path that is just busy, and a slice, so that the next one waits at its door.
uint64_t PathControl::Window() const {
  if (!meter_.measured()) return kFirstWindowBytes;
  const double pipe = meter_.bytes_per_second() * Seconds(meter_.delay());
  return static_cast<uint64_t>(2 * pipe) + SliceBytes();
}

bool PathControl::HasRoom(bool express, bool desperate) const {
  if (!traits().carries_slices || in_flight_.size() >= traits().slices_in_flight_max) return false;
  if (state_ == PathState::kUp || (desperate && state_ == PathState::kSuspect)) {
    if (bytes_in_flight_ < Window()) return true;
    return express && express_in_flight_ < std::min(kExpressBytesMax, bytes_in_flight_ - express_in_flight_);
  }
  // In probation not before a probe was answered.
  return state_ == PathState::kProbation && share_ > kProbationShare &&
         static_cast<double>(bytes_in_flight_) < share_ * static_cast<double>(Window());
}

Duration PathControl::Predict(uint64_t more_bytes) const {
  const Duration plain = meter_.Predict(bytes_in_flight_ + more_bytes);
  return Duration(static_cast<int64_t>(static_cast<double>(plain.count()) * traits().cost));
}

bool PathControl::DueForTrial(TimePoint now) const {
  return state_ == PathState::kUp && in_flight_.empty() && meter_.HasBeenFaster() &&
         now - last_sent_ >= options_->trial_period;
}

void PathControl::Send(TimePoint now, const Slice& slice) {
  MR_CHECK(connected());
  Sent sent;
  sent.at = now;
  sent.bytes = slice.local.size();
  sent.attempt = slice.attempt;
  sent.trial = DueForTrial(now);
  last_sent_ = now;
  bytes_in_flight_ += sent.bytes;
  sent.queued = bytes_in_flight_;
  sent.express = slice.express;
  sent.passes = slice.express && bytes_in_flight_ > express_in_flight_ + sent.bytes;
  if (sent.express) express_in_flight_ += sent.bytes;
  const Duration predicted = meter_.Predict(sent.queued);
  sent.late_at =
      now + std::max({options_->late_min,
                      Duration(static_cast<int64_t>(kLateFactor * static_cast<double>(predicted.count()))),
                      predicted + kLateDeviations * std::min(meter_.deviation(), kDeviationMax)});
  next_late_ = std::min(next_late_, sent.late_at);
  MR_CHECK(in_flight_.emplace(slice.id, sent).second, "two copies of a slice on one path");
  path_->Send(slice);
}

std::vector<uint64_t> PathControl::TakeLate(TimePoint now) {
  std::vector<uint64_t> late;
  if (now < next_late_) return late;
  next_late_ = kNoDeadline;
  for (const auto& [id, sent] : in_flight_) {
    if (sent.late) continue;
    if (sent.late_at > now) {
      next_late_ = std::min(next_late_, sent.late_at);
      continue;
    }
    late.push_back(id);
  }
  std::sort(late.begin(), late.end());  // the hash map's order must not decide anything
  for (const uint64_t id : late) {
    Sent& sent = in_flight_.at(id);
    sent.late = true;
    meter_.Late(now - sent.at, sent.queued);
  }
  if (!late.empty()) Suspect(now, "slices are late");
  return late;
}

void PathControl::CountHedge(uint64_t bytes) {
  ++slices_hedged_;
  bytes_hedged_ += bytes;
}

void PathControl::MoveTo(PathState state, TimePoint now) {
  state_ = state;
  state_since_ = now;
}

void PathControl::Suspect(TimePoint now, const char* why) {
  if (state_ != PathState::kUp && state_ != PathState::kProbation) return;
  reason_ = why;
  MoveTo(PathState::kSuspect, now);
  LogDebug("transfer: path {} -> {} ({}) to {} is suspect: {}", traits().local_rail, traits().remote_rail,
           traits().kind, peer_name_, why);
  if (probe_ == 0) SendProbe(now);
}

// One log line per outage and one per return.
void PathControl::Trusted(TimePoint now) {
  if (tripped_) {
    LogInfo("transfer: path {} -> {} ({}) to {} is up again", traits().local_rail, traits().remote_rail,
            traits().kind, peer_name_);
  }
  if (state_ != PathState::kSuspect || tripped_) sound_since_ = now;
  tripped_ = false;
  share_ = 1;
  MoveTo(PathState::kUp, now);
}

void PathControl::OnConnected(TimePoint now) {
  last_heard_ = now;
  bad_checksums_ = 0;
  MoveTo(PathState::kProbation, now);
  share_ = kProbationShare;
  probe_ = 0;
  if (!tripped_) Trusted(now);  // its first connection, or one that was given up without an outage
  SendProbe(now);
}

void PathControl::OnBroken(TimePoint now, const Status& why) {
  if (state_ != PathState::kDown) Down(now, why);
}

void PathControl::Down(TimePoint now, const Status& why) {
  if (connected()) {
    if (!tripped_) {
      ++trips_;
      if (now - sound_since_ > kSoundAfter) backoff_ = Duration::zero();
      LogWarning("transfer: path {} -> {} ({}) to {} is down: {}", traits().local_rail, traits().remote_rail,
                 traits().kind, peer_name_, Message(why));
    }
    tripped_ = true;
  }
  reason_ = std::string(Message(why));
  MoveTo(PathState::kDown, now);
  probe_ = 0;
  backoff_ = std::min(kBackoffMax, std::max(kBackoffMin, backoff_ * 2));
  // Jitter, so that many peers of a restarted host do not knock at once.
  retry_at_ = now + backoff_ / 2 +
              Duration(static_cast<int64_t>(jitter_.Uniform() * static_cast<double>(backoff_.count()) / 2));
  path_->Disconnect();
}

uint32_t PathControl::OnSliceDone(TimePoint now, uint64_t slice, SliceOutcome outcome) {
  const auto found = in_flight_.find(slice);
  MR_CHECK(found != in_flight_.end(), "an outcome of a slice that is not in flight");
  const Sent sent = found->second;
  in_flight_.erase(found);
  bytes_in_flight_ -= sent.bytes;
  if (sent.express) express_in_flight_ -= sent.bytes;
  if (in_flight_.empty()) next_late_ = kNoDeadline;
  if (outcome == SliceOutcome::kUnknown) {
    ++slices_resent_;
    return sent.attempt;
  }
  last_heard_ = heard_[sent.express] = now;
  if (outcome == SliceOutcome::kBadChecksum) {
    ++slices_resent_;
    ++bad_checksums_;
    return sent.attempt;
  }
  bad_checksums_ = 0;
  if (outcome != SliceOutcome::kLanded) return sent.attempt;
  if (!sent.passes) meter_.Landed(now, now - sent.at, sent.queued, sent.bytes, sent.trial);
  bytes_done_ += sent.bytes;
  ++slices_done_;
  if (state_ == PathState::kProbation && !sent.late) {
    share_ *= 2;
    if (share_ >= 1) Trusted(now);
  }
  return sent.attempt;
}

void PathControl::SendProbe(TimePoint now) {
  probe_ = next_probe_++;
  probe_sent_ = now;
  probe_alone_ = in_flight_.empty();
  path_->Probe(probe_);
}

void PathControl::OnProbeDone(TimePoint now, uint64_t probe) {
  last_heard_ = heard_[0] = now;
  if (probe != probe_) return;
  probe_ = 0;
  if (probe_alone_) meter_.Probed(now, now - probe_sent_);
  if (state_ == PathState::kProbation && in_flight_.empty()) {
    share_ *= 2;
    if (share_ >= 1) Trusted(now);
  }
}

Duration PathControl::ProbePatience() const {
  return std::max<Duration>(kProbePatience * options_->late_min,
                            4 * meter_.delay() + 4 * meter_.Predict(bytes_in_flight_));
}

TimePoint PathControl::Tick(TimePoint now, TimePoint peer_heard) {
  if (closed_) return kNoDeadline;
  if (state_ == PathState::kDown) {
    // Slices that are not terminal yet hold the path: the kind is still proving that they cannot land.
    if (now < retry_at_ || !in_flight_.empty()) return in_flight_.empty() ? retry_at_ : kNoDeadline;
    MoveTo(PathState::kConnecting, now);
    path_->Connect();
  }
  if (state_ == PathState::kDown) return retry_at_;
  if (state_ == PathState::kConnecting) {
    if (now - state_since_ >= kConnectPatience) Down(now, Unavailable("no answer"));
    return state_ == PathState::kDown ? retry_at_ : state_since_ + kConnectPatience;
  }
  return TickConnected(now, peer_heard);
}

TimePoint PathControl::TickConnected(TimePoint now, TimePoint peer_heard) {
  if (bad_checksums_ >= kBadChecksumsMax) {
    Down(now, DataLoss("{} wrong checksums in a row", bad_checksums_));
    return retry_at_;
  }
  const bool data = traits().carries_slices;
  if (data && probe_ != 0 && state_ != PathState::kSuspect && now - probe_sent_ >= ProbePatience())
    Suspect(now, "a probe is not answered");
  // Silent for the whole patience: given up whatever other paths say. Bulk and express are judged apart, for
  // they may travel on connections of their own.
  const Duration patience = data ? options_->slice_timeout : options_->peer_timeout;
  TimePoint waiting_since[2] = {probe_ != 0 ? probe_sent_ : kNoDeadline, kNoDeadline};
  for (const auto& [id, sent] : in_flight_)
    waiting_since[sent.express] = std::min(waiting_since[sent.express], sent.at);
  TimePoint next = kNoDeadline;
  for (const int lane : {0, 1}) {
    if (waiting_since[lane] == kNoDeadline) continue;
    const TimePoint silent_since = std::max(heard_[lane], waiting_since[lane]);
    if (now - silent_since >= patience) {
      Down(now, DeadlineExceeded("nothing was heard for {:.1f} s", Seconds(now - silent_since)));
      return retry_at_;
    }
    next = std::min(next, silent_since + patience);
  }
  if (state_ == PathState::kSuspect) {
    const bool answered = last_heard_ > state_since_;
    const bool late = std::any_of(in_flight_.begin(), in_flight_.end(),
                                  [](const auto& entry) { return entry.second.late; });
    if (answered && !late && probe_ == 0) {
      tripped_ ? MoveTo(PathState::kProbation, now) : Trusted(now);
    } else {
      const TimePoint silent_since = std::max(last_heard_, state_since_);
      const Duration silence = kSilence * options_->late_min;
      if (now - silent_since >= silence && peer_heard > silent_since) {
        Down(now, DeadlineExceeded("silent for {:.0f} ms while the peer is heard on another path",
                                   Seconds(now - last_heard_) * 1e3));
        return retry_at_;
      }
      next = std::min(next, std::max(silent_since + silence, now + silence / 4));
    }
  }
  if (probe_ == 0 && state_ != PathState::kSuspect) {
    const bool probation = state_ == PathState::kProbation;
    const Duration period = probation ? kProbationProbes : options_->heartbeat;
    const TimePoint due = (probation || !data ? probe_sent_ : std::max(probe_sent_, last_heard_)) + period;
    if (in_flight_.empty() && now >= due) {
      SendProbe(now);
      if (!connected()) return retry_at_;
    } else if (in_flight_.empty()) {
      next = std::min(next, due);
    }
  }
  if (probe_ != 0 && data && state_ != PathState::kSuspect)
    next = std::min(next, probe_sent_ + ProbePatience());
  return std::min(next, next_late_);
}

void PathControl::Close() {
  if (closed_) return;
  closed_ = true;
  MoveTo(PathState::kDown, state_since_);
  path_->Disconnect();
}

PathSnapshot PathControl::Describe() const {
  PathSnapshot snapshot;
  snapshot.kind = traits().carries_slices ? traits().kind : "control";
  snapshot.local_rail = traits().local_rail;
  snapshot.remote_rail = traits().remote_rail;
  snapshot.state = Name(state_);
  snapshot.reason = reason_;
  snapshot.bytes_done = bytes_done_;
  snapshot.slices_done = slices_done_;
  snapshot.slices_resent = slices_resent_;
  snapshot.slices_hedged = slices_hedged_;
  snapshot.bytes_hedged = bytes_hedged_;
  snapshot.trips = trips_;
  snapshot.bytes_in_flight = bytes_in_flight_;
  snapshot.window_bytes = Window();
  snapshot.bytes_per_second = meter_.measured() ? meter_.bytes_per_second() : 0;
  snapshot.delay_seconds = Seconds(meter_.delay());
  return snapshot;
}

}  // namespace millrace::transfer
