#include "tests/sim/fleet.h"

#include <algorithm>

#include "transfer/intent_list.h"
#include "transfer/peer.h"

namespace millrace::sim {
namespace {

using std::chrono::milliseconds;

constexpr uint64_t kRequestBlocks = 32;  // 2 MiB
constexpr uint64_t kRequests = 4;        // of each host, always under way
constexpr uint64_t kBlocks = kRequests * kRequestBlocks;
constexpr Duration kLookAgain =
    milliseconds(1);  // at a peer, at the latest: what is reported may make it due
constexpr Duration kQuiet = std::chrono::seconds(2);

// One process: memory that another writes to, and a peer of its own to write to.
struct Host {
  std::unique_ptr<Receiver> receiver;
  std::vector<Rail> rails;
  Sources sources;
  std::shared_ptr<transfer::MemoryTable> memory;  // shared with intent lists
  transfer::RegionId region = 0;
  transfer::TicketId ticket = 0;  // at the host it sends to
  Receiver* to = nullptr;
  std::unique_ptr<transfer::Peer> peer;
};

class Fleet {
 public:
  explicit Fleet(const FleetPlan& plan) : plan_(plan), random_(plan.seed), hosts_(Count(plan.hosts)) {
    start_ = world_.Now();
    for (size_t i = 0; i < hosts_.size(); ++i)
      hosts_[i].receiver = std::make_unique<Receiver>(&world_, &checks_, Bug::kNone, 1 + i, kBlocks);
    // A fixed way round the fleet: each receives from one and sends to one.
    for (size_t i = 0; i < hosts_.size(); ++i) Build(i, (i + hosts_.size() / 2 + 1) % hosts_.size());
    for (Host& host : hosts_) {
      for (Rail& rail : host.rails) {
        if (random_.Uniform() >= plan.broken) continue;
        ++broken_;
        world_.At(start_ + plan.begins, [&rail] { rail.black_hole = true; });
        world_.At(start_ + plan.ends, [&rail] { rail.black_hole = false; });
      }
    }
    for (Host& host : hosts_) Tick(host);
    for (Host& host : hosts_) {
      for (uint64_t slot = 0; slot < kRequests; ++slot) Start(host, slot);
    }
  }
  ~Fleet() {
    ending_ = true;
    for (Host& host : hosts_) host.peer.reset();
    for (Host& host : hosts_) host.receiver->Die();
  }

  FleetOutcome Run() {
    std::vector<double> goodput = Load();
    const TimePoint end = start_ + plan_.load_ends + kQuiet;
    while (checks_.violation.empty() && (world_.Step(end) || world_.Now() < end)) {
    }
    if (checks_.violation.empty()) CheckEnd();
    FleetOutcome outcome;
    outcome.violation = checks_.violation;
    outcome.steps = world_.steps();
    outcome.requests = requests_;
    std::vector<transfer::PathSnapshot> paths;
    for (const Host& host : hosts_) host.peer->Describe(&paths);
    for (const auto& path : paths) {
      outcome.trips += path.trips;
      outcome.hedged += path.slices_hedged;
    }
    const double all = plan_.bytes_per_second * plan_.rails * plan_.hosts;
    const double rest = all - plan_.bytes_per_second * broken_;
    outcome.before = Least(goodput, milliseconds(50), plan_.begins, all);
    outcome.during = Least(goodput, plan_.begins + milliseconds(50), plan_.ends, rest);
    outcome.after = Least(goodput, plan_.ends + milliseconds(200), plan_.load_ends, all);
    return outcome;
  }

 private:
  static size_t Count(int number) { return static_cast<size_t>(number); }

  void Build(size_t index, size_t to) {
    Host& host = hosts_[index];
    host.to = hosts_[to].receiver.get();
    host.rails.resize(Count(plan_.rails));
    host.sources.base = reinterpret_cast<std::byte*>(uint64_t{1} << 41);
    for (uint64_t b = 0; b < kBlocks; ++b) host.sources.stamp_of_block[b] = 1;
    host.memory = std::make_shared<transfer::MemoryTable>();
    host.region = host.memory->Register({host.sources.base, kBlocks * kBlock}, true);
    host.ticket = *host.to->memory.Open(1 + index, {{host.to->region, 0, kBlocks * kBlock}});
    host.peer = std::make_unique<transfer::Peer>(1, host.to->epoch, fmt::format("host{}", to), &options_,
                                                 &world_, random_.Next());
    for (size_t r = 0; r <= host.rails.size(); ++r) {
      const bool control = r == host.rails.size();
      Rail& rail = host.rails[control ? 0 : r];
      rail.bytes_per_second = plan_.bytes_per_second;
      host.peer->AddPath(std::make_unique<SimPath>(&world_, &rail, host.to, &host.sources, 1 + index,
                                                   &random_, fmt::format("rail{}", r), control));
    }
  }

  void Tick(Host& host) {
    if (ending_) return;
    const TimePoint now = world_.Now();
    const bool loaded = host.peer->queue().num_requests() > 0;
    const TimePoint next = host.peer->Tick(now);
    world_.At(loaded ? std::min(next, now + kLookAgain) : std::min(next, now + milliseconds(20)),
              [this, &host] { Tick(host); });
  }

  void Start(Host& host, uint64_t slot) {
    if (ending_ || world_.Now() >= start_ + plan_.load_ends) return;
    const uint64_t first = slot * kRequestBlocks;
    const uint64_t stamp = ++next_stamp_;
    for (uint64_t b = first; b < first + kRequestBlocks; ++b) {
      host.sources.busy.insert(b);
      host.sources.stamp_of_block[b] = stamp;
    }
    transfer::Request request;
    request.ticket = host.ticket;
    auto list = transfer::IntentList::Create(
        host.memory,
        {{{host.region, first * kBlock, kRequestBlocks * kBlock}, host.to->region, first * kBlock}});
    host.peer->Add(request, *std::move(list), [this, &host, slot, first, stamp](const Status& status) {
      if (ending_) return;
      if (!status.ok())
        checks_.Fail(world_, fmt::format("a request failed though rails lived: {}", Message(status)));
      for (uint64_t b = first; b < first + kRequestBlocks; ++b) {
        host.sources.busy.erase(b);
        if (host.to->stamps[b] != stamp)
          checks_.Fail(world_, "a request is done, but a block is not its own");
      }
      ++requests_;
      world_.After(Duration(1), [this, &host, slot] { Start(host, slot); });
    });
  }

  // Bytes per second of every bin.
  std::vector<double> Load() {
    std::vector<double> bins;
    uint64_t before = 0;
    for (TimePoint until = start_ + plan_.bin; until <= start_ + plan_.load_ends; until += plan_.bin) {
      while (checks_.violation.empty() && (world_.Step(until) || world_.Now() < until)) {
      }
      uint64_t landed = 0;
      for (const Host& host : hosts_) landed += host.receiver->bytes_landed;
      bins.push_back(static_cast<double>(landed - before) / Seconds(plan_.bin));
      before = landed;
    }
    return bins;
  }

  double Least(const std::vector<double>& bins, Duration from, Duration to, double of) const {
    double least = 0;
    for (size_t i = 0; i < bins.size(); ++i) {
      const Duration begins = plan_.bin * static_cast<int64_t>(i);
      if (begins < from || begins + plan_.bin > to) continue;
      least = least == 0 ? bins[i] / of : std::min(least, bins[i] / of);
    }
    return least;
  }

  void CheckEnd() {
    for (Host& host : hosts_) {
      if (host.peer->queue().num_requests() > 0) checks_.Fail(world_, "requests never ended");
      std::vector<transfer::PathSnapshot> paths;
      host.peer->Describe(&paths);
      for (const auto& path : paths) {
        if (path.state != "up")
          checks_.Fail(world_,
                       fmt::format("a path is {} ({}) long after the outage", path.state, path.reason));
      }
      bool drained = false;
      host.to->memory.Close(host.ticket, [&drained] { drained = true; });
      if (!drained) checks_.Fail(world_, "a ticket of ended requests does not drain");
    }
  }

  const FleetPlan plan_;
  World world_;
  Random random_;
  Checks checks_;
  transfer::Options options_;
  std::vector<Host> hosts_;
  TimePoint start_;
  int broken_ = 0;
  uint64_t next_stamp_ = 1;
  uint64_t requests_ = 0;
  bool ending_ = false;
};

}  // namespace

FleetOutcome RunFleet(const FleetPlan& plan) { return Fleet(plan).Run(); }

}  // namespace millrace::sim
