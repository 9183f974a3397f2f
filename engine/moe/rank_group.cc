#include "engine/moe/rank_group.h"

#include <algorithm>
#include <bit>
#include <mutex>
#include <thread>

#include "base/check.h"
#include "base/log.h"
#include "base/thread.h"

namespace millrace::engine {
namespace {

// Waiting for a peer: spin, as it usually is microseconds behind; then give the processor away; then sleep,
// with a look at its health each time.
constexpr int kSpins = 2000;
constexpr int kYields = 20;
constexpr int64_t kSleepUs = 1000;
constexpr int64_t kBeatUs = 5000;  // of the watching thread
constexpr Duration kJoinSpin =
    std::chrono::microseconds(100);  // between two passes, before an idle rank sleeps

Status Changed() { return Aborted("the group's membership has changed"); }

void Pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

class RankGroup final : public ExpertGroup {
 public:
  RankGroup(const RankGroupOptions& options, std::unique_ptr<GroupFabric> fabric)
      : options_(options),
        shape_(options.shape),
        fabric_(std::move(fabric)),
        control_(fabric_->control()),
        own_(fabric_->own()) {
    peers_.resize(static_cast<size_t>(shape_.num_ranks));
    health_.resize(peers_.size());
    for (size_t i = 0; i < options.held.size(); ++i) {
      for (int32_t e = 0; e < shape_.num_experts; ++e) {
        const bool held = (options.held[i][static_cast<size_t>(e)] & RankBit(options.rank)) != 0;
        own_.held()[Cell(static_cast<int32_t>(i), e)] = held ? 1 : 0;
      }
    }
    own_.header().idle.store(1);
  }

  ~RankGroup() override {
    {
      const std::lock_guard lock(mutex_);
      stopping_ = true;
    }
    fabric_->Ring();
    if (watcher_.joinable()) watcher_.join();
    // The others need not find out for themselves.
    if (joined_) fabric_->Remove(options_.rank, EpochOf(control_.state.load()), nullptr);
  }

  Status Join() {
    MR_RETURN_IF_ERROR(fabric_->Enter());
    joined_ = true;
    const TimePoint until = Clock::System().Now() + options_.form_max;
    while (true) {
      MR_ASSIGN_OR_RETURN(const bool formed, fabric_->Formed());
      if (formed) break;
      if (Clock::System().Now() > until) {
        const RankMask present = fabric_->present();
        return DeadlineExceeded("{} of {} ranks came within {:.0f} s, rank {} did not",
                                std::popcount(present), shape_.num_ranks, Seconds(options_.form_max),
                                std::countr_zero(~present));
      }
      std::this_thread::sleep_for(std::chrono::milliseconds(2));
    }
    MR_RETURN_IF_ERROR(Resync());
    watcher_ = std::thread([this] { Watch(); });
    return OkStatus();
  }

  int32_t rank() const override { return options_.rank; }
  const GroupShape& shape() const override { return shape_; }
  RankMask alive() const override { return LowOf(control_.state.load()); }
  uint32_t epoch() const override { return EpochOf(control_.state.load()); }

  StatusOr<GroupPass> BeginPass(PassKind wanted, bool mtp_rows) override;

  std::byte* outgoing_rows() override { return own_.rows(); }
  int32_t* outgoing_experts() override { return own_.experts(); }
  uint8_t* outgoing_owners() override { return own_.owners(); }
  Status Dispatch(int32_t num_rows) override {
    own_.header().num_rows.store(num_rows, std::memory_order_relaxed);
    return Exchange(Shown::kRows);
  }
  GroupRows From(int32_t rank) const override {
    if ((living_ & RankBit(rank)) == 0) return {};
    const RankMemory& memory = MemoryOf(rank);
    const int32_t count = memory.header().num_rows.load(std::memory_order_relaxed);
    return {std::clamp(count, 0, shape_.rows_max), memory.rows(), memory.experts(), memory.owners()};
  }
  bool current() const override { return EpochOf(control_.state.load()) == epoch_.load(); }
  float* ProductsFor(int32_t home) override { return own_.products(home); }
  Status Combine() override { return Exchange(Shown::kProducts); }
  const float* ProductsOf(int32_t owner) const override { return MemoryOf(owner).products(options_.rank); }

  RankMask Holders(int32_t layer, int32_t expert) const override { return holders_[Cell(layer, expert)]; }
  void SetHeld(int32_t layer, int32_t expert, bool held) override {
    Put(own_.held()[Cell(layer, expert)], static_cast<uint8_t>(held ? 1 : 0));
    own_.header().held_version.fetch_add(1, std::memory_order_relaxed);
    held_told_ = false;
  }
  void CountLoad(int32_t layer, std::span<const int32_t> experts) override {
    for (const int32_t expert : experts) {
      uint64_t& count = own_.loads()[Cell(layer, expert)];
      Put(count, count + 1);
    }
  }

  bool JoinWanted() override;
  void OnJoinWanted(std::function<void()> wake) override {
    const std::lock_guard lock(mutex_);
    wake_ = std::move(wake);
  }

  void Announce(uint32_t number) override { own_.header().announced.store(number); }
  std::vector<uint32_t> Announced() const override;
  std::vector<uint64_t> Loads() const override;
  std::vector<LayerPlacement> HeldNow() const override;
  bool leads() const override { return std::countr_zero(alive()) == options_.rank; }
  void SetTarget(uint32_t epoch, std::span<const LayerPlacement> target) override;
  std::optional<std::vector<LayerPlacement>> Target() const override;

 private:
  // Another rank's sign of life, as this one saw it last.
  struct Health {
    uint64_t beat = 0;
    TimePoint since;
  };

  size_t Cell(int32_t layer, int32_t expert) const {
    return static_cast<size_t>(layer) * static_cast<size_t>(shape_.num_experts) + static_cast<size_t>(expert);
  }
  const RankMemory& MemoryOf(int32_t rank) const {
    return rank == options_.rank ? own_ : *peers_[static_cast<size_t>(rank)];
  }
  template <typename F>
  void ForEachPeer(RankMask ranks, F&& f) const {
    for (RankMask left = ranks & ~RankBit(options_.rank); left != 0; left &= left - 1)
      f(std::countr_zero(left));
  }

  // Living ranks whose memory is there. With mutex_.
  template <typename F>
  void ForEachKnown(F&& f) const {
    for (RankMask left = alive(); left != 0; left &= left - 1) {
      const int32_t rank = std::countr_zero(left);
      if (rank == options_.rank || peers_[static_cast<size_t>(rank)] != nullptr) f(rank);
    }
  }

  Status Resync();
  Status Exchange(Shown what);
  Status Await(int32_t peer, uint64_t at);
  bool Behind() const;
  void CheckPeers();
  void LearnHolders();
  void Watch();

  const RankGroupOptions options_;
  const GroupShape shape_;
  const std::unique_ptr<GroupFabric> fabric_;
  ControlHeader& control_;
  RankMemory& own_;
  bool joined_ = false;

  // Engine thread. The first two are read by the watcher.
  std::atomic<uint32_t> epoch_{0};
  std::atomic<uint64_t> reached_{0};  // exchanges in this epoch
  RankMask living_ = 0;               // in this epoch
  std::vector<RankMask> holders_;     // [layers, experts]
  uint64_t holders_version_ = 0;      // sum of held_version, and the epoch
  bool covered_ = false;
  std::atomic<bool> held_told_{true};
  bool passed_ = false;  // a pass since the engine slept last

  mutable std::mutex mutex_;  // peers_ against the watcher and the balancer, and what follows
  std::vector<std::shared_ptr<const RankMemory>> peers_;
  std::vector<Health> health_;
  std::function<void()> wake_;
  bool stopping_ = false;
  std::thread watcher_;
};

// Takes the current membership, with the memory of the ranks that are new in it.
Status RankGroup::Resync() {
  while (true) {
    const uint64_t state = control_.state.load();
    if ((LowOf(state) & RankBit(options_.rank)) == 0 ||
        control_.incarnations[options_.rank].load() != own_.header().incarnation) {
      return FailedPrecondition("rank {} was cast out of its group: it had stopped for too long",
                                options_.rank);
    }
    Status status;
    ForEachPeer(LowOf(state), [&](int32_t rank) {
      auto& peer = peers_[static_cast<size_t>(rank)];
      if (!status.ok() ||
          (peer != nullptr && peer->header().incarnation == control_.incarnations[rank].load())) {
        return;
      }
      StatusOr<std::shared_ptr<const RankMemory>> memory = fabric_->Open(rank);
      if (!memory.ok()) {
        status = memory.status();
        return;
      }
      const std::lock_guard lock(mutex_);
      peer = *std::move(memory);
      health_[static_cast<size_t>(rank)] = {0, Clock::System().Now()};
    });
    if (control_.state.load() != state) continue;  // changed meanwhile
    MR_RETURN_IF_ERROR(status);
    // What was shown in the old epoch must not come after what the new one shows in the same place.
    fabric_->Settle();
    living_ = LowOf(state);
    reached_.store(0);
    epoch_.store(EpochOf(state));
    own_.header().at.store(MakeAt(EpochOf(state), 0));
    return OkStatus();
  }
}

// One step forward, together with all others.
Status RankGroup::Exchange(Shown what) {
  const uint64_t step = reached_.load(std::memory_order_relaxed) + 1;
  const uint64_t at = MakeAt(epoch_.load(std::memory_order_relaxed), step);
  reached_.store(step);
  own_.header().at.store(at);
  fabric_->Show(living_ & ~RankBit(options_.rank), what);
  Status status;
  ForEachPeer(living_, [&](int32_t rank) {
    if (status.ok()) status = Await(rank, at);
  });
  return status;
}

Status RankGroup::Await(int32_t peer, uint64_t at) {
  const std::atomic<uint64_t>& theirs = MemoryOf(peer).header().at;
  const std::atomic<uint64_t>& state = control_.state;
  const uint32_t epoch = epoch_.load(std::memory_order_relaxed);
  TimePoint begun;
  for (int i = 0;; ++i) {
    const uint64_t now = theirs.load(std::memory_order_acquire);
    if (SameEpoch(now, at) && now >= at) return OkStatus();
    if (i % 64 == 0 && EpochOf(state.load(std::memory_order_relaxed)) != epoch) return Changed();
    if (i < kSpins) {
      Pause();
    } else if (i < kSpins + kYields) {
      std::this_thread::yield();
    } else {
      if (i == kSpins + kYields) begun = Clock::System().Now();
      own_.header().sleeping.store(1);
      // Little-endian: the low half of `at` comes first.
      if (theirs.load() == now) WaitOnWord(&theirs, static_cast<uint32_t>(now), kSleepUs);
      own_.header().sleeping.store(0);
      CheckPeers();
      if (EpochOf(state.load(std::memory_order_relaxed)) != epoch) return Changed();
      if (Clock::System().Now() - begun > options_.stall_max) {
        fabric_->Remove(peer, epoch, "it has not done its part of a pass for too long");
      }
    }
  }
}

StatusOr<GroupPass> RankGroup::BeginPass(PassKind wanted, bool mtp_rows) {
  RankHeader& own = own_.header();
  own.idle.store(0);
  passed_ = true;
  while (true) {
    if (EpochOf(control_.state.load()) != epoch_.load()) MR_RETURN_IF_ERROR(Resync());
    own.wanted.store(static_cast<int32_t>(wanted), std::memory_order_relaxed);
    own.wanted_mtp.store(mtp_rows ? 1 : 0, std::memory_order_relaxed);
    held_told_ = true;
    const Status status = Exchange(Shown::kWish);
    if (status.ok()) break;
    if (!absl::IsAborted(status)) return status;
  }
  LearnHolders();
  GroupPass pass;
  pass.covered = covered_;
  auto kind = PassKind::kIdle;
  for (int32_t rank = 0; rank < shape_.num_ranks; ++rank) {
    if ((living_ & RankBit(rank)) == 0) continue;
    const RankHeader& header = MemoryOf(rank).header();
    const auto theirs = static_cast<PassKind>(header.wanted.load(std::memory_order_relaxed));
    pass.mtp |= header.wanted_mtp.load(std::memory_order_relaxed) != 0;
    if (theirs != PassKind::kIdle && (kind == PassKind::kIdle || theirs < kind)) kind = theirs;
  }
  if (covered_) pass.kind = kind;
  // Before the next pass nobody may change what others still read of this one. A pass with layers has
  // exchanges for that.
  if (pass.kind == PassKind::kIdle) {
    if (const Status status = Exchange(Shown::kNothing); !status.ok() && !absl::IsAborted(status))
      return status;
  }
  return pass;
}

void RankGroup::LearnHolders() {
  uint64_t version = uint64_t{epoch_.load()} << 32;
  for (int32_t rank = 0; rank < shape_.num_ranks; ++rank) {
    if ((living_ & RankBit(rank)) != 0)
      version += MemoryOf(rank).header().held_version.load(std::memory_order_relaxed);
  }
  if (version == holders_version_ && !holders_.empty()) return;
  holders_version_ = version;
  holders_.assign(Cell(shape_.num_layers, 0), 0);
  for (int32_t rank = 0; rank < shape_.num_ranks; ++rank) {
    if ((living_ & RankBit(rank)) == 0) continue;
    const uint8_t* const held = MemoryOf(rank).held();
    for (size_t i = 0; i < holders_.size(); ++i) {
      if (Get(held[i]) != 0) holders_[i] |= RankBit(rank);
    }
  }
  covered_ = std::find(holders_.begin(), holders_.end(), RankMask{0}) == holders_.end();
}

// Another rank is further than this one, or membership has changed.
bool RankGroup::Behind() const {
  const uint64_t state = control_.state.load();
  if (EpochOf(state) != epoch_.load()) return true;
  const uint64_t mine = MakeAt(epoch_.load(), reached_.load());
  bool behind = false;
  ForEachPeer(LowOf(state), [&](int32_t rank) {
    const uint64_t theirs = MemoryOf(rank).header().at.load();
    behind |= SameEpoch(theirs, mine) && theirs > mine;
  });
  return behind;
}

bool RankGroup::JoinWanted() {
  const TimePoint until = passed_ ? Clock::System().Now() + kJoinSpin : TimePoint{};
  passed_ = false;
  while (true) {
    if (!held_told_ || Behind()) return true;
    if (Clock::System().Now() >= until) break;
    std::this_thread::yield();
  }
  own_.header().idle.store(1);
  if (!Behind()) return false;  // who comes later sees `idle` and rings
  own_.header().idle.store(0);
  return true;
}

// The thread that shows that this process runs, looks whether the others do, and wakes the engine for passes.
void RankGroup::Watch() {
  SetThreadName("expert-group");
  RankHeader& own = own_.header();
  std::atomic<uint32_t>& bell = control_.bell;
  while (true) {
    const uint32_t seen = bell.load();
    own.beat.fetch_add(1);
    CheckPeers();
    {
      const std::lock_guard lock(mutex_);
      if (stopping_) return;
      if (own.idle.load() != 0 && wake_ && Behind()) wake_();
    }
    WaitOnWord(&bell, seen, kBeatUs);
  }
}

void RankGroup::CheckPeers() {
  const std::lock_guard lock(mutex_);
  const uint64_t state = control_.state.load();
  if (EpochOf(state) != epoch_.load()) return;  // the engine thread has to take it first
  const TimePoint now = Clock::System().Now();
  ForEachPeer(LowOf(state), [&](int32_t rank) {
    const RankMemory& memory = MemoryOf(rank);
    Health& health = health_[static_cast<size_t>(rank)];
    if (const uint64_t beat = memory.header().beat.load();
        beat != health.beat || health.since == TimePoint{}) {
      health = {beat, now};
    }
    if (!memory.OwnerLives()) {
      fabric_->Remove(rank, EpochOf(state), "its process is gone");
    } else if (now - health.since > options_.heartbeat_max) {
      fabric_->Remove(rank, EpochOf(state), "its process does not run");
    }
  });
}

std::vector<uint32_t> RankGroup::Announced() const {
  const std::lock_guard lock(mutex_);
  std::vector<uint32_t> numbers(static_cast<size_t>(shape_.num_ranks));
  ForEachKnown(
      [&](int32_t rank) { numbers[static_cast<size_t>(rank)] = MemoryOf(rank).header().announced.load(); });
  return numbers;
}

std::vector<uint64_t> RankGroup::Loads() const {
  const std::lock_guard lock(mutex_);
  std::vector<uint64_t> sum(Cell(shape_.num_layers, 0));
  ForEachKnown([&](int32_t rank) {
    const uint64_t* const loads = MemoryOf(rank).loads();
    for (size_t i = 0; i < sum.size(); ++i) sum[i] += Get(loads[i]);
  });
  return sum;
}

std::vector<LayerPlacement> RankGroup::HeldNow() const {
  const std::lock_guard lock(mutex_);
  std::vector<LayerPlacement> held(static_cast<size_t>(shape_.num_layers),
                                   LayerPlacement(static_cast<size_t>(shape_.num_experts)));
  ForEachKnown([&](int32_t rank) {
    const uint8_t* const theirs = MemoryOf(rank).held();
    for (int32_t l = 0; l < shape_.num_layers; ++l) {
      for (int32_t e = 0; e < shape_.num_experts; ++e) {
        if (Get(theirs[Cell(l, e)]) == 0) continue;
        held[static_cast<size_t>(l)][static_cast<size_t>(e)] |= RankBit(rank);
      }
    }
  });
  return held;
}

void RankGroup::SetTarget(uint32_t epoch, std::span<const LayerPlacement> target) {
  RankHeader& own = own_.header();
  own.target_version.fetch_add(1);
  own.target_epoch.store(epoch);
  for (int32_t l = 0; l < shape_.num_layers; ++l) {
    for (int32_t e = 0; e < shape_.num_experts; ++e) {
      Put(own_.target()[Cell(l, e)], target[static_cast<size_t>(l)][static_cast<size_t>(e)]);
    }
  }
  own.target_version.fetch_add(1);
}

std::optional<std::vector<LayerPlacement>> RankGroup::Target() const {
  const std::lock_guard lock(mutex_);
  const uint64_t state = control_.state.load();
  const int32_t leader = std::countr_zero(LowOf(state));
  if (leader >= shape_.num_ranks) return std::nullopt;
  if (leader != options_.rank && peers_[static_cast<size_t>(leader)] == nullptr) return std::nullopt;
  const RankMemory& memory = MemoryOf(leader);
  const uint64_t version = memory.header().target_version.load();
  if (version % 2 != 0 || version == 0 || memory.header().target_epoch.load() != EpochOf(state))
    return std::nullopt;
  std::vector<LayerPlacement> target(static_cast<size_t>(shape_.num_layers),
                                     LayerPlacement(static_cast<size_t>(shape_.num_experts)));
  for (int32_t l = 0; l < shape_.num_layers; ++l) {
    for (int32_t e = 0; e < shape_.num_experts; ++e) {
      target[static_cast<size_t>(l)][static_cast<size_t>(e)] = Get(memory.target()[Cell(l, e)]);
    }
  }
  if (memory.header().target_version.load() != version) return std::nullopt;
  return target;
}

}  // namespace

Status CheckRank(const RankGroupOptions& options) {
  const GroupShape& shape = options.shape;
  if (shape.num_ranks < 1 || shape.num_ranks > kGroupRanksMax || options.rank < 0 ||
      options.rank >= shape.num_ranks) {
    return InvalidArgument("rank {} of {}: ranks are 0 to n - 1, at most {}", options.rank, shape.num_ranks,
                           kGroupRanksMax);
  }
  if (shape.num_experts < shape.num_ranks) {
    return InvalidArgument("{} ranks for {} experts", shape.num_ranks, shape.num_experts);
  }
  return OkStatus();
}

StatusOr<std::unique_ptr<ExpertGroup>> JoinGroup(const RankGroupOptions& options,
                                                 std::unique_ptr<GroupFabric> fabric) {
  MR_RETURN_IF_ERROR(CheckRank(options));
  auto group = std::make_unique<RankGroup>(options, std::move(fabric));
  MR_RETURN_IF_ERROR(group->Join());
  return group;
}

}  // namespace millrace::engine
