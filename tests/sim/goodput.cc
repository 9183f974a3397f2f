#include "tests/sim/goodput.h"

#include <algorithm>
#include <deque>

#include "transfer/intent_list.h"
#include "transfer/peer.h"

namespace millrace::sim {
namespace {

using transfer::Slice;
using transfer::SliceOutcome;

// Slices are bound to rails when a request arrives: in turn, or in one equal run for each. A rail that is
// silent for the plan's patience is given up, and what it held goes to the others in turn.
class EarlyBinder : public transfer::PathOwner {
 public:
  EarlyBinder(World* world, Policy policy, const OutagePlan& plan, std::function<void(uint64_t request)> done)
      : world_(world), policy_(policy), plan_(plan), done_(std::move(done)) {}
  void AddPath(std::unique_ptr<transfer::Path> path) {
    path->Attach(this);
    lanes_.emplace_back().path = std::move(path);
    lanes_.back().path->Connect();
  }
  void Add(uint64_t request, std::vector<Slice> slices) {
    left_[request] = slices.size();
    for (size_t i = 0; i < slices.size(); ++i) {
      const size_t lane =
          policy_ == Policy::kRoundRobin ? i % lanes_.size() : i * lanes_.size() / slices.size();
      Lane& to = lanes_[lane].given_up ? NextLane() : lanes_[lane];
      to.waiting.push_back(slices[i]);
    }
    Pump();
  }
  void Tick() {
    for (Lane& lane : lanes_) {
      if (lane.given_up || lane.in_flight.empty() || world_->Now() - lane.heard < plan_.patience) continue;
      lane.given_up = true;
      lane.path->Disconnect();
      for (const Slice& slice : std::exchange(lane.waiting, {})) NextLane().waiting.push_back(slice);
    }
    Pump();
  }

  void OnConnected(transfer::Path* path) override {
    Find(path).connected = true;
    Pump();
  }
  void OnBroken(transfer::Path*, const Status&) override {}
  void OnProbeDone(transfer::Path*, uint64_t) override {}
  void OnRefused(const Status&) override {}
  void OnSliceDone(transfer::Path* path, uint64_t id, SliceOutcome outcome) override {
    Lane& lane = Find(path);
    const auto found = lane.in_flight.find(id);
    Slice slice = found->second;
    lane.in_flight.erase(found);
    lane.heard = world_->Now();
    if (outcome == SliceOutcome::kLanded) {
      if (--left_[slice.request] == 0) done_(slice.request);
    } else {
      ++slice.attempt;
      NextLane().waiting.push_back(slice);
    }
    Pump();
  }

 private:
  struct Lane {
    std::unique_ptr<transfer::Path> path;
    std::deque<Slice> waiting;
    std::map<uint64_t, Slice> in_flight;
    TimePoint heard;
    bool given_up = false;
    bool connected = false;
  };
  Lane& Find(transfer::Path* path) {
    return *std::find_if(lanes_.begin(), lanes_.end(),
                         [path](const Lane& l) { return l.path.get() == path; });
  }
  Lane& NextLane() {
    while (lanes_[++turn_ % lanes_.size()].given_up) {
    }
    return lanes_[turn_ % lanes_.size()];
  }
  void Pump() {
    for (Lane& lane : lanes_) {
      if (lane.given_up || !lane.connected) continue;
      while (!lane.waiting.empty() && lane.in_flight.size() < 8) {
        const Slice slice = lane.waiting.front();
        lane.waiting.pop_front();
        if (lane.in_flight.empty()) lane.heard = world_->Now();
        lane.in_flight.emplace(slice.id, slice);
        lane.path->Send(slice);
      }
    }
  }

  World* const world_;
  const Policy policy_;
  const OutagePlan plan_;
  const std::function<void(uint64_t)> done_;
  std::vector<Lane> lanes_;
  std::map<uint64_t, size_t> left_;
  size_t turn_ = 0;
};

// The rails, a receiver with one ticket over its memory, and a load that never ends.
class Outage {
 public:
  Outage(Policy policy, const OutagePlan& plan)
      : plan_(plan),
        receiver_(&world_, &checks_, Bug::kNone, 1, plan.requests * plan.request_blocks),
        rails_(plan.rails) {
    const uint64_t blocks = plan.requests * plan.request_blocks;
    options_.trial_period = plan.trial_period;
    sources_.base = reinterpret_cast<std::byte*>(uint64_t{1} << 41);
    for (uint64_t b = 0; b < blocks; ++b) {
      sources_.busy.insert(b);
      sources_.stamp_of_block[b] = 1;
    }
    memory_ = std::make_shared<transfer::MemoryTable>();
    region_ = memory_->Register({sources_.base, blocks * kBlock}, true);
    ticket_ = *receiver_.memory.Open(kEpoch, {{receiver_.region, 0, blocks * kBlock}});
    for (Rail& rail : rails_) rail.bytes_per_second = plan.bytes_per_second;
    if (policy == Policy::kLateBinding) {
      peer_ = std::make_unique<transfer::Peer>(1, 1, "sim", &options_, &world_, 7);
    } else {
      binder_ = std::make_unique<EarlyBinder>(&world_, policy, plan, [this](uint64_t slot) { Start(slot); });
    }
    for (Rail& rail : rails_) {
      auto path =
          std::make_unique<SimPath>(&world_, &rail, &receiver_, &sources_, kEpoch, &random_, "rail", false);
      peer_ != nullptr ? peer_->AddPath(std::move(path)) : binder_->AddPath(std::move(path));
    }
  }
  ~Outage() {
    ending_ = true;
    peer_.reset();
    binder_.reset();
    receiver_.Die();
  }

  std::vector<double> Run() {
    const TimePoint start = world_.Now();
    const auto strike = [this](bool on) {
      rails_[0].black_hole = on && plan_.factor == 0;
      rails_[0].factor = on && plan_.factor > 0 ? plan_.factor : 1;
    };
    world_.At(start + plan_.begins, [strike] { strike(true); });
    world_.At(start + plan_.ends, [strike] { strike(false); });
    world_.After(std::chrono::milliseconds(2), [this] {
      for (uint64_t slot = 0; slot < plan_.requests; ++slot) Start(slot);
    });
    std::vector<double> bins;
    uint64_t before = 0;
    for (TimePoint until = start + plan_.bin; until <= start + plan_.length; until += plan_.bin) {
      TimePoint next{};
      do {
        const TimePoint tick = world_.Now() + std::chrono::milliseconds(1);
        next = peer_ != nullptr ? peer_->Tick(world_.Now()) : (binder_->Tick(), tick);
      } while (world_.Step(std::min(next, until)) || world_.Now() < until);
      bins.push_back(static_cast<double>(receiver_.bytes_landed - before) / Seconds(plan_.bin));
      before = receiver_.bytes_landed;
    }
    return bins;
  }

 private:
  static constexpr uint64_t kEpoch = 77;

  void Start(uint64_t slot) {
    if (ending_) return;
    const uint64_t at = slot * plan_.request_blocks * kBlock;
    if (peer_ != nullptr) {
      transfer::Request request;
      request.ticket = ticket_;
      auto list = transfer::IntentList::Create(
          memory_, {{{region_, at, plan_.request_blocks * kBlock}, receiver_.region, at}});
      peer_->Add(request, *std::move(list),
                 [this, slot](const Status&) { world_.After(Duration(1), [this, slot] { Start(slot); }); });
      return;
    }
    std::vector<Slice> slices;
    for (uint64_t b = 0; b < plan_.request_blocks; b += 4) {
      Slice slice;
      slice.id = ++next_slice_;
      slice.request = slot;
      slice.local = {sources_.base + at + b * kBlock, 4 * kBlock};
      slice.ticket = ticket_;
      slice.remote_region = receiver_.region;
      slice.remote_offset = at + b * kBlock;
      slices.push_back(slice);
    }
    binder_->Add(slot, std::move(slices));
  }

  const OutagePlan plan_;
  World world_;
  Random random_{11};
  Checks checks_;
  Receiver receiver_;
  std::vector<Rail> rails_;
  Sources sources_;
  transfer::Options options_;
  std::shared_ptr<transfer::MemoryTable> memory_;  // shared with intent lists
  transfer::RegionId region_ = 0;
  transfer::TicketId ticket_ = 0;
  std::unique_ptr<transfer::Peer> peer_;
  std::unique_ptr<EarlyBinder> binder_;
  uint64_t next_slice_ = 0;
  bool ending_ = false;
};

}  // namespace

const char* Name(Policy policy) {
  static constexpr const char* kNames[] = {"late binding", "round robin", "static split"};
  return kNames[static_cast<int>(policy)];
}

std::vector<double> GoodputThroughOutage(Policy policy, const OutagePlan& plan) {
  return Outage(policy, plan).Run();
}

Duration TimeToRecover(const std::vector<double>& goodput, const OutagePlan& plan, double part) {
  const double wanted = part * plan.bytes_per_second * (plan.rails - 1);
  const auto first = static_cast<size_t>(plan.begins / plan.bin);
  size_t back = first;
  for (size_t i = first; i < goodput.size(); ++i) {
    if (goodput[i] < wanted) back = i + 1;
  }
  return plan.bin * static_cast<int64_t>(back - first);
}

std::string GoodputSvg(const OutagePlan& plan) {
  constexpr int kWidth = 900, kHeight = 360, kLeft = 70, kTop = 40, kBottom = 50;
  constexpr const char* kColours[] = {"#0b6e4f", "#c8553d", "#5b5f97"};
  const double top = plan.bytes_per_second * plan.rails * 1.1;
  const double total = Seconds(plan.length);
  const auto x = [&](double s) { return kLeft + s / total * (kWidth - kLeft - 20); };
  const auto y = [&](double rate) { return kTop + (1 - rate / top) * (kHeight - kTop - kBottom); };
  std::string svg = fmt::format(
      "<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {} {}' font-family='sans-serif' font-size='13'>\n"
      "<rect width='100%' height='100%' fill='white'/>\n"
      "<text x='{}' y='22' font-size='15'>Goodput while one of {} rails swallows everything "
      "(simulated)</text>\n"
      "<rect x='{:.1f}' y='{}' width='{:.1f}' height='{}' fill='#eee'/>\n",
      kWidth, kHeight, kLeft, plan.rails, x(Seconds(plan.begins)), kTop,
      x(Seconds(plan.ends)) - x(Seconds(plan.begins)), kHeight - kTop - kBottom);
  for (int rail = 0; rail <= plan.rails; ++rail) {
    const double at = y(plan.bytes_per_second * rail);
    svg += fmt::format(
        "<line x1='{}' x2='{}' y1='{:.1f}' y2='{:.1f}' stroke='#ccc'/><text x='{}' y='{:.1f}' "
        "text-anchor='end'>{:.1f} GB/s</text>\n",
        kLeft, kWidth - 20, at, at, kLeft - 6, at + 4, plan.bytes_per_second * rail / 1e9);
  }
  for (int tenth = 0; tenth <= 10; tenth += 2)
    svg += fmt::format("<text x='{:.1f}' y='{}' text-anchor='{}'>{:.0f} ms</text>\n", x(total * tenth / 10),
                       kHeight - kBottom + 18, tenth == 10 ? "end" : "middle", total * tenth * 100);
  for (const Policy policy : {Policy::kStaticSplit, Policy::kRoundRobin, Policy::kLateBinding}) {
    const auto i = static_cast<int>(policy);
    const auto goodput = GoodputThroughOutage(policy, plan);
    // The two that bind early may well coincide: the wide one lies below.
    svg += fmt::format("<polyline fill='none' stroke='{}' stroke-width='{}' points='", kColours[i],
                       policy == Policy::kStaticSplit ? 6 : 2);
    for (size_t bin = 0; bin < goodput.size(); ++bin)
      svg += fmt::format("{:.1f},{:.1f} ", x(Seconds(plan.bin) * (static_cast<double>(bin) + 0.5)),
                         y(goodput[bin]));
    svg += fmt::format("'/>\n<text x='{}' y='{}' fill='{}'>{}</text>\n", kLeft + i * 150, kHeight - 10,
                       kColours[i], Name(policy));
  }
  return svg + "</svg>\n";
}

}  // namespace millrace::sim
