#include "tests/sim/scenario.h"

#include <algorithm>

#include "transfer/intent_list.h"
#include "transfer/peer.h"

namespace millrace::sim {
namespace {

using std::chrono::microseconds;
using std::chrono::milliseconds;
using transfer::TicketId;

constexpr uint64_t kBlocks = 512;  // of either side's memory
constexpr uint64_t kSenderEpoch = 77;
constexpr Duration kFaultsEnd = milliseconds(600);
// After the last fault: every path is up again within kHealed, and nothing is left undone.
constexpr Duration kHealed = std::chrono::seconds(2);
// The longest pause before a path connects again, and a peer's patience: longer, or one would be lost whose
// rails live.
constexpr Duration kPauseMax = milliseconds(510);
constexpr Duration kPeerTimeout = std::chrono::seconds(1);

// A ticket's life: several requests to the same blocks, one after the other, then the close; or an abort
// midway.
struct Job {
  TicketId ticket = 0;
  transfer::Operation operation = transfer::Operation::kWrite;
  uint64_t first = 0, count = 0;  // blocks
  int requests_left = 0;
  int pending = 0;
  bool aborted = false;  // the sender was told to stop
  bool closing = false;  // its receiver closes the ticket
  uint64_t receiver_epoch = 0;
};

class Schedule {
 public:
  Schedule(uint64_t seed, Bug bug) : random_(seed), bug_(bug) {
    options_.queued_bytes_max = uint64_t{1} << 40;
    options_.connections_per_path = 1;
    options_.peer_timeout = kPeerTimeout;
    options_.trial_period = milliseconds(50);  // so that there are trials
    sources_.base = reinterpret_cast<std::byte*>(uint64_t{1} << 41);
    memory_ = std::make_shared<transfer::MemoryTable>();
    region_ = memory_->Register({sources_.base, kBlocks * kBlock}, true);
    rails_.resize(1 + random_.Below(4));
    for (Rail& rail : rails_) {
      rail.bytes_per_second = 1e8 * static_cast<double>(1 + random_.Below(20));
      rail.delay = microseconds(10 + random_.Below(300));
    }
    StartReceiver();
    const uint64_t jobs = 3 + random_.Below(6);
    for (uint64_t i = 0; i < jobs; ++i)
      world_.After(microseconds(random_.Below(500'000)), [this] { StartJob(); });
    const uint64_t faults = random_.Below(6);
    for (uint64_t i = 0; i < faults; ++i) PlanFault();
    if (random_.Below(4) == 0) PlanSilence();
    world_.After(milliseconds(50), [this] { Watch(); });
  }

  ~Schedule() {
    peers_.clear();
    for (const auto& receiver : receivers_) receiver->Die();
  }

  Outcome Run() {
    const TimePoint end = faults_end_ + kHealed;
    TimePoint next{};
    while (checks_.violation.empty()) {
      for (const auto& peer : peers_) next = std::min(next, peer->Tick(world_.Now()));
      if (peer().lost()) Reopen();
      const TimePoint until = std::min(next, end);
      next = kNoDeadline;
      if (!world_.Step(until) && world_.Now() >= end) break;
    }
    if (checks_.violation.empty()) CheckEnd();
    Outcome outcome;
    outcome.violation = checks_.violation;
    outcome.steps = world_.steps();
    outcome.requests_ok = ok_;
    outcome.reads_ok = reads_ok_;
    outcome.requests_failed = failed_;
    outcome.reopened = reopened_;
    std::vector<transfer::PathSnapshot> paths;
    for (const auto& peer : peers_) peer->Describe(&paths);
    for (const auto& path : paths) {
      outcome.trips += path.trips;
      outcome.slices_hedged += path.slices_hedged;
    }
    for (const auto& receiver : receivers_) outcome.slices_superseded += receiver->landing.num_superseded();
    return outcome;
  }

 private:
  Receiver& receiver() { return *receivers_.back(); }
  transfer::Peer& peer() { return *peers_.back(); }

  void StartReceiver() {
    const uint64_t epoch = bug_ == Bug::kReusedEpoch ? 1000 : 1000 + receivers_.size();
    receivers_.push_back(std::make_unique<Receiver>(&world_, &checks_, bug_, epoch, kBlocks));
    OpenPeer(epoch);
  }

  void OpenPeer(uint64_t epoch) {
    const auto id = bug_ == Bug::kNumbersAnew ? 1 : static_cast<transfer::PeerId>(peers_.size() + 1);
    peers_.push_back(std::make_unique<transfer::Peer>(id, epoch, "sim", &options_, &world_, random_.Next()));
    for (size_t i = 0; i <= rails_.size(); ++i) {
      const bool control = i == rails_.size();
      Rail* const rail = &rails_[control ? 0 : i];
      peer().AddPath(std::make_unique<SimPath>(&world_, rail, &receiver(), &sources_, kSenderEpoch, &random_,
                                               fmt::format("rail{}", i), control));
    }
  }

  // The receiver lives, and may know nothing of it.
  void Reopen() {
    if (!severed_ && world_.Now() - healed_ > kPauseMax)
      checks_.Fail(world_, "the peer was lost though rails lived");
    ++reopened_;
    OpenPeer(receiver().epoch);
  }

  // Takes free blocks of the receiver for a ticket.
  bool TakeBlocks(uint64_t count, uint64_t* first) {
    for (int tries = 0; tries < 10; ++tries) {
      *first = random_.Below(kBlocks - count);
      bool free = true;
      for (uint64_t b = *first; b < *first + count; ++b) free = free && !taken_[b];
      if (free) return true;
    }
    return false;
  }

  void StartJob() {
    auto job = std::make_shared<Job>();
    job->count = 1 + random_.Below(40);
    if (receiver().dead || !TakeBlocks(job->count, &job->first)) return;
    for (uint64_t b = job->first; b < job->first + job->count; ++b) {
      taken_[b] = true;
      receiver().guarded[b] = false;
    }
    if (random_.Below(3) == 0) job->operation = transfer::Operation::kRead;
    auto ticket = receiver().memory.Open(
        kSenderEpoch, {{receiver().region, job->first * kBlock, job->count * kBlock}}, job->operation);
    job->ticket = *ticket;
    job->receiver_epoch = receiver().epoch;
    job->requests_left = static_cast<int>(1 + random_.Below(6));
    ++jobs_open_;
    if (random_.Below(3) == 0) {
      Receiver* const owner = &receiver();
      transfer::Peer* const to = &peer();
      world_.After(microseconds(random_.Below(100'000)), [this, job, owner, to] {
        if (job->closing || owner->dead) return;
        job->requests_left = 0;
        // Either side first: the owner of the memory may close while the sender knows nothing of it.
        job->aborted = true;
        if (random_.Below(2) == 0) to->queue().Cancel(job->ticket, [] {});
        Close(job, owner);
      });
    }
    Next(job, &receiver(), &peer());
  }

  void Next(const std::shared_ptr<Job>& job, Receiver* owner, transfer::Peer* to) {
    if (job->requests_left == 0 || owner->dead) {
      if (!job->closing) Close(job, owner);
      return;
    }
    --job->requests_left;
    const uint64_t stamp = ++next_stamp_;
    uint64_t source = 0;
    const bool read = job->operation == transfer::Operation::kRead;
    if (!TakeSource(job->count, read ? ++next_stamp_ : stamp, &source)) return Close(job, owner);
    if (read) std::fill_n(owner->stamps.begin() + static_cast<ptrdiff_t>(job->first), job->count, stamp);
    transfer::Request request;
    request.operation = job->operation;
    request.ticket = job->ticket;
    request.priority = static_cast<int32_t>(random_.Below(3));
    request.deadline = kNoDeadline;
    // Some requests are one run, some one intent for each block, in any order.
    std::vector<transfer::Intent> intents;
    if (random_.Below(2) == 0) {
      intents.push_back(
          {{region_, source * kBlock, job->count * kBlock}, owner->region, job->first * kBlock});
    } else {
      for (uint64_t b = job->count; b-- > 0;)
        intents.push_back(
            {{region_, (source + b) * kBlock, kBlock}, owner->region, (job->first + b) * kBlock});
    }
    auto list = transfer::IntentList::Create(memory_, intents);
    ++job->pending;
    ++pending_;
    const TimePoint began = world_.Now();
    to->Add(request, *std::move(list), [=, this](Status status) {
      --job->pending;
      --pending_;
      if (read && status.ok()) CheckRead(*job, source, stamp);
      FreeSource(job->count, source);
      CheckDone(*job, owner, *to, stamp, status, began);
      // Sometimes at once, sometimes late: what was written stays until somebody writes anew.
      const uint64_t pause = random_.Below(2) == 0 ? random_.Below(2'000) : random_.Below(60'000);
      world_.After(microseconds(pause), [=, this] {
        if (owner->dead) return Abandon(job, owner);
        if (status.ok()) CheckStamps(*job, owner, stamp, began);
        if (!to->lost()) return Next(job, owner, to);
        // Given up with its peer, or tried again in the same place under the same ticket.
        random_.Below(3) == 0 ? Close(job, owner) : Next(job, owner, &peer());
      });
    });
  }

  bool TakeSource(uint64_t count, uint64_t stamp, uint64_t* first) {
    for (int tries = 0; tries < 20; ++tries) {
      *first = random_.Below(kBlocks - count);
      bool free = true;
      for (uint64_t b = *first; b < *first + count; ++b) free = free && !sources_.busy.contains(b);
      if (!free) continue;
      for (uint64_t b = *first; b < *first + count; ++b) {
        sources_.busy.insert(b);
        sources_.stamp_of_block[b] = stamp;
      }
      return true;
    }
    return false;
  }
  void FreeSource(uint64_t count, uint64_t first) {
    for (uint64_t b = first; b < first + count; ++b) {
      sources_.busy.erase(b);
      sources_.stamp_of_block[b] = ++next_stamp_;  // it is reused at once
    }
  }

  void CheckDone(const Job& job, Receiver* owner, const transfer::Peer& to, uint64_t stamp,
                 const Status& status, TimePoint began) {
    if (!status.ok()) {
      ++failed_;
      const bool expected = owner->dead || to.lost() ||
                            (job.aborted && (status.code() == absl::StatusCode::kCancelled ||
                                             status.code() == absl::StatusCode::kPermissionDenied));
      if (!expected)
        checks_.Fail(world_, fmt::format("a request failed though a rail lived: {}", Message(status)));
      return;
    }
    ++ok_;
    CheckStamps(job, owner, stamp, began);
  }

  void CheckRead(const Job& job, uint64_t source, uint64_t stamp) {
    ++reads_ok_;
    for (uint64_t b = 0; b < job.count; ++b) {
      if (const uint64_t got = sources_.stamp_of_block[source + b]; got != stamp)
        checks_.Fail(world_,
                     fmt::format("a read is done, but its block {} has stamp {}, not {}", b, got, stamp));
    }
  }

  void CheckStamps(const Job& job, Receiver* owner, uint64_t stamp, TimePoint began) {
    // The ticket may be closed and its blocks given to others by now.
    if (job.closing || owner->dead) return;
    for (uint64_t b = job.first; b < job.first + job.count; ++b) {
      if (owner->stamps[b] != stamp)
        checks_.Fail(world_,
                     fmt::format("a request that began at {:.6f} is done, but block {} has stamp {}, not {}",
                                 Seconds(began.time_since_epoch()), b, owner->stamps[b], stamp));
    }
  }

  void Close(const std::shared_ptr<Job>& job, Receiver* owner) {
    if (job->closing) return;
    job->closing = true;
    if (owner->dead) return Abandon(job, owner);
    owner->memory.Close(job->ticket, [=, this] {
      if (owner->dead) return;
      for (uint64_t b = job->first; b < job->first + job->count; ++b) {
        owner->guarded[b] = true;
        taken_[b] = false;
      }
      --jobs_open_;
    });
  }

  // Its receiver is gone, and the memory with it.
  void Abandon(const std::shared_ptr<Job>& job, Receiver* owner) {
    if (!owner->dead) return Close(job, owner);
    job->closing = true;
  }

  void PlanFault() {
    Rail* const rail = &rails_[random_.Below(rails_.size())];
    const TimePoint begin = world_.Now() + microseconds(random_.Below(400'000));
    const TimePoint end =
        std::min(begin + microseconds(1'000 + random_.Below(200'000)), world_.Now() + kFaultsEnd);
    // No fault of one rail heals it while all are severed.
    const auto cut = [rail](bool on) {
      if (rail->severed) return;
      rail->cut = on;
      if (!on) return;
      const auto paths = rail->paths;
      for (SimPath* const path : paths) path->Cut();
    };
    switch (random_.Below(7)) {
      case 0:
        world_.At(begin, [cut] { cut(true); });
        world_.At(end, [cut] { cut(false); });
        break;
      case 1:
      case 2:
        world_.At(begin, [rail] { rail->black_hole = true; });
        world_.At(end, [rail] { rail->black_hole = rail->severed; });
        break;
      case 3: {
        const double factor = 0.02 + 0.5 * random_.Uniform();
        world_.At(begin, [rail, factor] { rail->factor = factor; });
        world_.At(end, [rail] { rail->factor = 1; });
        break;
      }
      case 4:
        world_.At(begin, [rail] { rail->damage = 0.3; });
        world_.At(end, [rail] { rail->damage = 0; });
        break;
      case 5:
        for (TimePoint at = begin; at < end; at += milliseconds(40)) {
          world_.At(at, [cut] { cut(true); });
          world_.At(std::min(end, at + milliseconds(15)), [cut] { cut(false); });
        }
        break;
      default:
        if (random_.Below(3) != 0 || restart_planned_) break;
        restart_planned_ = true;
        world_.At(begin, [this] { Restart(); });
    }
  }

  // Every rail is severed for longer than a peer is waited for.
  void PlanSilence() {
    const TimePoint begin = world_.Now() + microseconds(random_.Below(400'000));
    const TimePoint end = begin + kPeerTimeout + milliseconds(100 + random_.Below(300));
    faults_end_ = std::max(faults_end_, end);
    const auto sever = [this](bool on) {
      severed_ = on;
      healed_ = world_.Now();
      for (Rail& rail : rails_) {
        rail.severed = rail.cut = rail.black_hole = on;
        const auto paths = rail.paths;
        for (SimPath* const path : paths) {
          if (on) path->Cut();
        }
      }
    };
    world_.At(begin, [sever] { sever(true); });
    world_.At(end, [sever] { sever(false); });
  }

  void Restart() {
    Receiver* const old = &receiver();
    old->Die();
    std::fill(taken_.begin(), taken_.end(), false);
    jobs_open_ = 0;
    StartReceiver();
    old->successor = &receiver();
    const uint64_t jobs = 1 + random_.Below(3);
    for (uint64_t i = 0; i < jobs; ++i)
      world_.After(microseconds(random_.Below(100'000)), [this] { StartJob(); });
  }

  void Watch() {
    receiver().Watch();
    world_.After(milliseconds(50), [this] { Watch(); });
  }

  void CheckEnd() {
    if (pending_ > 0) checks_.Fail(world_, fmt::format("{} requests never ended", pending_));
    if (jobs_open_ > 0) checks_.Fail(world_, fmt::format("{} tickets never drained", jobs_open_));
    if (receiver().memory.num_open() > 0) checks_.Fail(world_, "the receiver holds tickets that are over");
    if (peer().queue().num_slices() > 0) checks_.Fail(world_, "the sender holds slices that are over");
    std::vector<transfer::PathSnapshot> paths;
    peer().Describe(&paths);
    for (const auto& path : paths) {
      if (path.state != "up")
        checks_.Fail(world_, fmt::format("{} is {} ({}) long after the last fault", path.local_rail,
                                         path.state, path.reason));
      if (path.bytes_in_flight > 0) checks_.Fail(world_, "bytes are in flight though nothing is");
    }
    if (!memory_->Deregister(region_).ok()) checks_.Fail(world_, "the sender's region is still in use");
  }

  World world_;
  Random random_;
  const Bug bug_;
  Checks checks_;
  transfer::Options options_;
  Sources sources_;
  std::shared_ptr<transfer::MemoryTable> memory_;  // shared with intent lists
  transfer::RegionId region_ = 0;
  std::vector<Rail> rails_;
  bool severed_ = false;
  TimePoint healed_{};
  TimePoint faults_end_ = world_.Now() + kFaultsEnd;
  std::vector<std::unique_ptr<Receiver>> receivers_;
  std::vector<std::unique_ptr<transfer::Peer>> peers_;
  std::vector<bool> taken_ = std::vector<bool>(kBlocks);
  uint64_t next_stamp_ = 0;
  int pending_ = 0, jobs_open_ = 0, ok_ = 0, reads_ok_ = 0, failed_ = 0;
  uint64_t reopened_ = 0;
  bool restart_planned_ = false;
};

}  // namespace

Outcome RunSchedule(uint64_t seed, Bug bug) { return Schedule(seed, bug).Run(); }

}  // namespace millrace::sim
