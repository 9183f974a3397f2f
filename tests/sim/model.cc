#include "tests/sim/model.h"

#include <deque>

#include "base/check.h"

namespace millrace::sim {

using std::chrono::microseconds;
using std::chrono::milliseconds;
using transfer::Slice;
using transfer::SliceOutcome;

const char* Name(Bug bug) {
  static constexpr const char* kNames[] = {
      "None",          "FlushIsSuccess",  "SkipDrain",   "LeftoversLand", "ReusedEpoch", "ForgottenSlice",
      "ReadAfterDone", "ChecksumIgnored", "TimerDrains", "ReadUnpinned",  "NumbersAnew"};
  return kNames[static_cast<int>(bug)];
}

// The receiving end of one connection. Frames reach it in order; a black hole holds them back.
class SimConnection : public transfer::Lander, public std::enable_shared_from_this<SimConnection> {
 public:
  SimConnection(SimPath* path, uint64_t generation)
      : world_(path->world_),
        rail_(path->rail_),
        receiver_(path->receiver_),
        random_(path->random_),
        sender_epoch_(path->own_epoch_),
        path_(path),
        generation_(generation) {
    receiver_->open.push_back(this);
    receiver_->landing.Join(sender_epoch_);
  }
  void LeavePath() { path_ = nullptr; }
  // Its sender has gone without a word that came through: this end stays half open, and what was on the way
  // comes when a retransmission does.
  void LeaveHalfOpen() { held_until_ = world_->Now() + microseconds(random_->Below(4'000'000)); }
  bool closed() const { return closed_; }

  // A frame of `bytes` enters the rail now: `begins` when its first byte arrives, `ends` with its last.
  void Transmit(uint64_t bytes, std::function<void()> departs, std::function<void()> begins,
                std::function<void()> ends) {
    const TimePoint start = std::max({world_->Now(), rail_->busy_until});
    const double rate = rail_->bytes_per_second * rail_->factor;
    const Duration wire(static_cast<int64_t>(static_cast<double>(bytes + 64) / rate * 1e9));
    rail_->busy_until = start + wire;
    auto self = shared_from_this();
    world_->At(start, [departs = std::move(departs)] { departs(); });
    Arrive(start + rail_->delay, std::move(begins));
    Arrive(start + wire + rail_->delay, std::move(ends));
  }

  // Runs `what` at the receiver, in order, when the rail lets it through; never once this end is closed.
  void Arrive(TimePoint when, std::function<void()> what) {
    if (closed_) return;
    queue_.push_back(std::move(what));
    world_->At(when, [self = shared_from_this()] {
      ++self->due_;
      self->Deliver();
    });
  }

  void Deliver() {
    if (rail_->black_hole || world_->Now() < held_until_) {
      if (!polling_ && !closed_) {
        polling_ = true;
        // A retransmission finds the rail healed some time later.
        const Duration pause = milliseconds(5) + microseconds(random_->Below(50'000));
        world_->At(std::max(world_->Now() + pause, held_until_), [self = shared_from_this()] {
          self->polling_ = false;
          self->Deliver();
        });
      }
      return;
    }
    while (due_ > 0 && !closed_ && !queue_.empty()) {
      --due_;
      const auto what = std::move(queue_.front());
      queue_.pop_front();
      what();
    }
  }

  // Back to the sender, if it is still the same connection.
  void Answer(std::function<void(SimPath*)> what) {
    world_->After(rail_->delay,
                  [self = shared_from_this(), what = std::move(what)] { self->AnswerNow(what); });
  }
  void AnswerNow(const std::function<void(SimPath*)>& what) {
    if (path_ == nullptr || path_->generation_ != generation_) return;
    if (rail_->black_hole) {
      world_->After(milliseconds(5) + microseconds(random_->Below(50'000)),
                    [self = shared_from_this(), what] { self->AnswerNow(what); });
      return;
    }
    what(path_);
  }

  // Whether the sender still has this connection.
  auto Alive(uint64_t generation) {
    return [self = shared_from_this(), generation] {
      return self->path_ != nullptr && self->path_->generation_ == generation;
    };
  }

  void Begin(const Slice& slice) {
    slice_ = slice;
    refused_ = superseded_ = landing_ = false;
    progress_ = world_->Now();
    const bool leftovers = receiver_->bug == Bug::kLeftoversLand;
    tabled_ = receiver_->landing.Begin(sender_epoch_, slice.id, slice.attempt, slice.retired_below, this);
    if (!tabled_ && !leftovers) {
      superseded_ = true;
      return;
    }
    const auto admitted =
        receiver_->memory.Admit(sender_epoch_, slice.ticket, slice.operation, slice.remote_region,
                                slice.remote_offset, static_cast<uint32_t>(slice.local.size()));
    if (!admitted.ok()) {
      if (tabled_) receiver_->landing.End(sender_epoch_, slice.id);
      refused_ = true;
      return;
    }
    landing_ = pinned_ = true;
    if (receiver_->bug == Bug::kSkipDrain) ForgetPin();
    target_ = *admitted;
    Land(0, slice.local.size() / 2, stamp_);
  }

  void End(bool damaged) {
    if (landing_) Land(slice_.local.size() / 2, slice_.local.size(), damaged ? ~uint64_t{0} : stamp_);
    const SliceOutcome outcome = superseded_ ? SliceOutcome::kUnknown
                                 : refused_  ? SliceOutcome::kRefused
                                 : damaged && receiver_->bug != Bug::kChecksumIgnored
                                     ? SliceOutcome::kBadChecksum
                                     : SliceOutcome::kLanded;
    const uint64_t id = slice_.id;
    if (outcome == SliceOutcome::kLanded) receiver_->bytes_landed += slice_.local.size();
    LandingOver();
    Answer([id, outcome](SimPath* path) { Report(path, id, outcome); });
  }

  // The owner's side of a read: checked, sent from memory while the ticket is pinned, landed by the
  // initiator.
  void Read(const Slice& slice) {
    const uint64_t id = slice.id;
    const auto admitted =
        receiver_->memory.Admit(sender_epoch_, slice.ticket, slice.operation, slice.remote_region,
                                slice.remote_offset, static_cast<uint32_t>(slice.local.size()));
    if (!admitted.ok()) return Answer([id](SimPath* path) { Report(path, id, SliceOutcome::kRefused); });
    reads_.emplace(id, slice.ticket);
    if (receiver_->bug == Bug::kReadUnpinned) EndRead(id);
    const TimePoint start = std::max(world_->Now(), rail_->back_busy_until);
    const double rate = rail_->bytes_per_second * rail_->factor;
    const Duration wire(static_cast<int64_t>(static_cast<double>(slice.local.size() + 64) / rate * 1e9));
    rail_->back_busy_until = start + wire;
    const bool damaged = random_->Uniform() < rail_->damage;
    world_->At(start + wire, [self = shared_from_this(), slice, from = *admitted, damaged] {
      if (!self->closed_) self->SendData(slice, from, damaged);
    });
  }

  // The last byte leaves the owner's memory.
  void SendData(const Slice& slice, const std::byte* from, bool damaged) {
    std::vector<uint64_t> stamps;
    for (uint64_t at = 0; at * kBlock < slice.local.size(); ++at) {
      const size_t block = receiver_->BlockOf(from) + at;
      if (receiver_->guarded[block])
        receiver_->checks->Fail(*world_, fmt::format("read {} takes block {} after its ticket {} had drained",
                                                     slice.id, block, slice.ticket));
      stamps.push_back(damaged ? ~uint64_t{0} : receiver_->stamps[block]);
    }
    EndRead(slice.id);
    Answer([slice, stamps, damaged](SimPath* path) {
      if (!path->in_flight_.contains(slice.id)) return;
      const uint64_t first = static_cast<uint64_t>(slice.local.data() - path->sources_->base) / kBlock;
      for (size_t i = 0; i < stamps.size(); ++i) {
        if (!path->sources_->busy.contains(first + i))
          path->receiver_->checks->Fail(
              *path->world_, fmt::format("read {} lands in memory whose request has ended", slice.id));
        path->sources_->stamp_of_block[first + i] = stamps[i];
      }
      Report(path, slice.id, damaged ? SliceOutcome::kBadChecksum : SliceOutcome::kLanded);
    });
  }

  static void Report(SimPath* path, uint64_t id, SliceOutcome outcome) {
    if (path->in_flight_.erase(id) > 0) path->owner_->OnSliceDone(path, id, outcome);
  }

  void SetStamp(uint64_t stamp) { stamp_ = stamp; }

  void Supersede() override {
    landing_ = false;
    superseded_ = true;
    ForgetPin();
  }

  // This end is over. The sender notices by a reset, if the rail lets it through.
  void Close() {
    if (closed_) return;
    closed_ = true;
    LandingOver();
    while (!reads_.empty()) EndRead(reads_.begin()->first);
    std::erase(receiver_->open, this);
    receiver_->landing.Leave(sender_epoch_);
    queue_.clear();  // its frames hold this connection
    due_ = 0;
    Answer([](SimPath* path) { path->Cut(); });
  }

  void ForgetPin() {
    if (!pinned_) return;
    pinned_ = false;
    receiver_->memory.Unpin(slice_.ticket);
  }
  bool StuckIn(Duration patience) const {
    return landing_ && receiver_->memory.IsClosing(slice_.ticket) && world_->Now() - progress_ > patience;
  }

 private:
  void LandingOver() {
    if (!landing_) return;
    landing_ = false;
    if (tabled_) receiver_->landing.End(sender_epoch_, slice_.id);
    ForgetPin();
  }

  void EndRead(uint64_t slice) {
    const auto found = reads_.find(slice);
    if (found == reads_.end()) return;
    const transfer::TicketId ticket = found->second;
    reads_.erase(found);
    receiver_->memory.Unpin(ticket);
  }

  void Land(uint64_t from, uint64_t to, uint64_t stamp) {
    progress_ = world_->Now();
    for (uint64_t at = from / kBlock; at * kBlock < to; ++at) {
      const size_t block = receiver_->BlockOf(target_) + at;
      if (receiver_->guarded[block])
        receiver_->checks->Fail(
            *world_, fmt::format("slice {} lands in block {} after its ticket {} had drained", slice_.id,
                                 block, slice_.ticket));
      receiver_->stamps[block] = stamp;
    }
  }

  World* const world_;
  Rail* const rail_;
  Receiver* const receiver_;
  Random* const random_;
  const uint64_t sender_epoch_;
  SimPath* path_;
  const uint64_t generation_;
  std::deque<std::function<void()>> queue_;
  int due_ = 0;
  bool polling_ = false;
  TimePoint held_until_{};  // of a half-open end
  bool closed_ = false;
  Slice slice_;
  uint64_t stamp_ = 0;
  std::byte* target_ = nullptr;
  bool landing_ = false, pinned_ = false, refused_ = false, superseded_ = false, tabled_ = false;
  TimePoint progress_{};
  std::map<uint64_t, transfer::TicketId> reads_;  // being sent; their tickets are pinned
};

Receiver::Receiver(World* w, Checks* c, Bug b, uint64_t e, uint64_t blocks)
    : world(w), checks(c), bug(b), epoch(e), stamps(blocks), guarded(blocks) {
  // Addresses that nobody looks at: far from any real object, and from null.
  memory_base = reinterpret_cast<std::byte*>(uint64_t{1} << 40);
  region = memory.Register({memory_base, blocks * kBlock}, true);
}

void Receiver::Die() {
  dead = true;
  while (!open.empty()) open.front()->Close();
}

void Receiver::Watch() {
  const std::vector<SimConnection*> now = open;
  for (SimConnection* const connection : now) {
    if (bug == Bug::kTimerDrains && connection->StuckIn(milliseconds(0))) {
      connection->ForgetPin();
    } else if (connection->StuckIn(milliseconds(200))) {
      connection->Close();
    }
  }
}

SimPath::SimPath(World* world, Rail* rail, Receiver* receiver, Sources* sources, uint64_t own_epoch,
                 Random* random, std::string name, bool control)
    : world_(world),
      rail_(rail),
      receiver_(receiver),
      sources_(sources),
      own_epoch_(own_epoch),
      random_(random) {
  traits_.kind = "sim";
  traits_.local_rail = traits_.remote_rail = std::move(name);
  traits_.carries_slices = !control;
  rail_->paths.push_back(this);
}

SimPath::~SimPath() {
  std::erase(rail_->paths, this);
  if (connection_ != nullptr) connection_->LeavePath();
}

void SimPath::Connect() {
  const uint64_t generation = ++generation_;
  if (rail_->cut) return owner_->OnBroken(this, Unavailable("no carrier"));
  while (receiver_->dead) {
    if (receiver_->successor == nullptr) return owner_->OnBroken(this, Unavailable("connection refused"));
    if (receiver_->bug != Bug::kReusedEpoch) {
      owner_->OnRefused(Unavailable("another epoch"));
      return owner_->OnBroken(this, Unavailable("another epoch"));
    }
    receiver_ = receiver_->successor;
  }
  connection_ = std::make_shared<SimConnection>(this, generation);
  connection_->Arrive(world_->Now() + rail_->delay, [connection = connection_] {
    connection->Answer([](SimPath* path) {
      path->connected_ = true;
      path->owner_->OnConnected(path);
    });
  });
}

void SimPath::Disconnect() {
  ++generation_;
  connected_ = false;
  if (connection_ != nullptr) {
    // What is on the way goes on; behind it comes the end of the connection.
    connection_->LeavePath();
    if (rail_->severed) connection_->LeaveHalfOpen();
    connection_->Arrive(std::max(world_->Now(), rail_->busy_until) + rail_->delay,
                        [connection = connection_.get()] { connection->Close(); });
    connection_.reset();
  }
  const auto lost = std::exchange(in_flight_, {});
  bool first = true;
  for (const auto& [id, slice] : lost) {
    if (first && receiver_->bug == Bug::kForgottenSlice) {
      first = false;
      continue;
    }
    const bool lie = receiver_->bug == Bug::kFlushIsSuccess;
    owner_->OnSliceDone(this, id, lie ? SliceOutcome::kLanded : SliceOutcome::kUnknown);
  }
}

void SimPath::Cut() {
  if (!connected_ && connection_ == nullptr) return;
  connected_ = false;
  owner_->OnBroken(this, Unavailable("connection reset"));
}

void SimPath::Send(const Slice& slice) {
  MR_CHECK(connected_);
  in_flight_.emplace(slice.id, slice);
  if (slice.operation == transfer::Operation::kRead) return SendRead(slice);
  const uint64_t block = static_cast<uint64_t>(slice.local.data() - sources_->base) / kBlock;
  const auto stamp = std::make_shared<uint64_t>(0);
  const bool damaged = random_->Uniform() < rail_->damage;
  const uint64_t generation = generation_;
  auto* const sources = sources_;
  const auto connection = connection_;
  rail_->bytes_carried += slice.local.size();
  Checks* const checks = receiver_->checks;
  World* const world = world_;
  const bool late_read = receiver_->bug == Bug::kReadAfterDone;
  const auto alive = connection->Alive(generation);
  connection->Transmit(
      slice.local.size(),
      // The socket takes the bytes: a connection that is closed by then does not.
      [=] {
        if (!late_read && !alive()) return;
        if (!sources->busy.contains(block))
          checks->Fail(*world, fmt::format("slice {} is read from memory whose request has ended", slice.id));
        *stamp = sources->stamp_of_block.at(block);
      },
      [=] {
        if (*stamp == 0) return;
        connection->SetStamp(*stamp);
        connection->Begin(slice);
      },
      [=] {
        if (*stamp != 0) connection->End(damaged);
      });
}

void SimPath::SendRead(const Slice& slice) {
  const TimePoint start = std::max(world_->Now(), rail_->busy_until);
  rail_->bytes_carried += slice.local.size();
  connection_->Arrive(start + rail_->delay, [connection = connection_, slice] { connection->Read(slice); });
}

void SimPath::Probe(uint64_t probe) {
  MR_CHECK(connected_);
  const auto connection = connection_;
  const auto answer = [probe](SimPath* path) { path->owner_->OnProbeDone(path, probe); };
  const TimePoint start = std::max(world_->Now(), rail_->busy_until);
  connection->Arrive(start + rail_->delay, [connection, answer] { connection->Answer(answer); });
}

}  // namespace millrace::sim
