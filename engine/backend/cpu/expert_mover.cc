#include "engine/backend/cpu/expert_mover.h"

#include <sched.h>

#include <algorithm>
#include <bit>

#include "base/check.h"
#include "base/log.h"
#include "base/thread.h"
#include "engine/backend/cpu/load_jobs.h"

namespace millrace::engine {
namespace {

constexpr auto kLookEvery = std::chrono::milliseconds(5);
constexpr size_t kSlabSlots = 8;
constexpr double kGainMin = 0.05;       // of a layer's imbalance, for a move to pay
constexpr double kDecisionsMin = 1000;  // of a layer between two looks, to believe what they say

// Background loads run only when nothing else wants the processor.
void SetBackground(bool background) {
  const sched_param param = {};
  sched_setscheduler(0, background ? SCHED_IDLE : SCHED_OTHER, &param);
}

// Living ranks are numbered without gaps while a placement is made.
RankMask Compress(RankMask ranks, RankMask alive) {
  RankMask result = 0;
  int32_t number = 0;
  for (RankMask left = alive; left != 0; left &= left - 1, ++number) {
    if ((ranks & RankBit(std::countr_zero(left))) != 0) result |= RankBit(number);
  }
  return result;
}
RankMask Expand(RankMask numbers, RankMask alive) {
  RankMask result = 0;
  int32_t number = 0;
  for (RankMask left = alive; left != 0; left &= left - 1, ++number) {
    if ((numbers & RankBit(number)) != 0) result |= RankBit(std::countr_zero(left));
  }
  return result;
}

}  // namespace

ExpertMover::ExpertMover(std::shared_ptr<const CpuWeights> weights, const CpuGroupOptions& options,
                         int num_threads)
    : weights_(std::move(weights)),
      options_(options),
      group_(*options.group),
      num_threads_(num_threads),
      expert_bytes_(ExpertBytes(weights_->config_, weights_->format_)),
      looked_(Clock::System().Now()) {
  const auto add = [&](const LayerWeights& layer) {
    if (!layer.moe) return;
    experts_.push_back(layer.experts);
    std::vector<State>& states = states_.emplace_back();
    for (const FfnWeights& ffn : layer.experts)
      states.push_back(ffn.width > 0 ? State::kHeld : State::kAbsent);
  };
  for (const LayerWeights& layer : weights_->layers) add(layer);
  for (const MtpWeights& mtp : weights_->mtp) add(mtp.layer);
  MR_CHECK(static_cast<int32_t>(experts_.size()) == group_.shape().num_layers);
  loads_before_ = group_.Loads();
  thread_ = std::thread([this] { Loop(); });
}

ExpertMover::~ExpertMover() {
  {
    const std::lock_guard lock(mutex_);
    stopping_ = true;
  }
  stop_.notify_all();
  thread_.join();
}

void ExpertMover::BeforePass() {
  if (!has_changes_.load()) return;
  const std::lock_guard lock(mutex_);
  for (Change& change : changes_) {
    FfnWeights& place = experts_[static_cast<size_t>(change.layer)][static_cast<size_t>(change.expert)];
    State& state = states_[static_cast<size_t>(change.layer)][static_cast<size_t>(change.expert)];
    const bool comes = change.ffn.width > 0;
    if (!comes) {
      retired_.push_back(reinterpret_cast<std::byte*>(const_cast<char*>(place.gate_up.data)));
      place = {};
    } else {
      place = change.ffn;
    }
    state = comes ? State::kHeld : State::kAbsent;
    group_.SetHeld(change.layer, change.expert, comes);
  }
  changes_.clear();
  has_changes_ = false;
}

void ExpertMover::PassBegun() {
  if (retired_.empty()) return;
  const std::lock_guard lock(mutex_);
  free_.insert(free_.end(), retired_.begin(), retired_.end());
  retired_.clear();
}

void ExpertMover::OnChanges(std::function<void()> wake) {
  const std::lock_guard lock(mutex_);
  wake_ = std::move(wake);
}

Status ExpertMover::status() const {
  const std::lock_guard lock(mutex_);
  return status_;
}

void ExpertMover::Loop() {
  SetThreadName("expert-mover");
  std::unique_lock lock(mutex_);
  while (!stop_.wait_for(lock, kLookEvery, [this] { return stopping_; })) {
    lock.unlock();
    if (group_.leads()) Lead();
    Follow();
    lock.lock();
  }
}

std::vector<LayerPlacement> ExpertMover::CoverAll(const std::vector<LayerPlacement>& held) const {
  const std::vector<uint64_t> loads = group_.Loads();
  const RankMask alive = group_.alive();
  std::vector<LayerPlacement> target;
  const auto num_experts = static_cast<size_t>(group_.shape().num_experts);
  for (size_t l = 0; l < held.size(); ++l) {
    const std::vector<double> load(loads.begin() + static_cast<ptrdiff_t>(l * num_experts),
                                   loads.begin() + static_cast<ptrdiff_t>((l + 1) * num_experts));
    target.push_back(CoveredPlacement(held[l], load, alive));
  }
  return target;
}

void ExpertMover::Lead() {
  const uint32_t epoch = group_.epoch();
  const std::vector<LayerPlacement> held = group_.HeldNow();
  if (epoch != target_epoch_) {
    // Nothing here may rest on what a former member holds.
    std::vector<LayerPlacement> target = CoverAll(held);
    if (group_.epoch() != epoch) return;
    target_ = std::move(target);
    target_epoch_ = epoch;
    plans_.clear();
    group_.SetTarget(epoch, target_);
    return;
  }
  if (held != target_) return;  // one thing after another
  if (!plans_.empty()) {
    target_[static_cast<size_t>(plans_.back().layer)] = std::move(plans_.back().placement);
    plans_.pop_back();
    group_.SetTarget(epoch, target_);
    return;
  }
  const TimePoint now = Clock::System().Now();
  if (options_.rebalance_every == Duration::zero() || now - looked_ < options_.rebalance_every) return;
  looked_ = now;
  Rebalance();
}

// Plans for the layers whose load could be more even than it has been since the last look.
void ExpertMover::Rebalance() {
  const std::vector<uint64_t> loads = group_.Loads();
  const RankMask alive = group_.alive();
  const auto num_experts = static_cast<size_t>(group_.shape().num_experts);
  BalanceShape shape;
  shape.num_ranks = std::popcount(alive);
  const int32_t even = (group_.shape().num_experts + shape.num_ranks - 1) / shape.num_ranks;
  shape.slots_per_rank = std::clamp(options_.slots_per_layer, even, group_.shape().num_experts);
  std::vector<std::pair<double, Plan>> found;
  double gained = 0;
  double sum = 0;
  for (size_t l = 0; l < target_.size(); ++l) {
    std::vector<double> load(num_experts);
    double decisions = 0;
    for (size_t e = 0; e < num_experts; ++e) {
      const size_t cell = l * num_experts + e;
      load[e] =
          loads[cell] >= loads_before_[cell] ? static_cast<double>(loads[cell] - loads_before_[cell]) : 0;
      decisions += load[e];
    }
    const double before = Imbalance(load, target_[l], alive);
    sum += before;
    if (decisions < kDecisionsMin) continue;
    LayerPlacement current = target_[l];
    for (RankMask& ranks : current) ranks = Compress(ranks, alive);
    Plan plan{static_cast<int32_t>(l), Renamed(BalancedPlacement(load, shape), current, shape)};
    for (RankMask& ranks : plan.placement) ranks = Expand(ranks, alive);
    const double gain = before - Imbalance(load, plan.placement, alive);
    if (gain >= kGainMin) found.emplace_back(gain, std::move(plan));
  }
  std::sort(found.begin(), found.end(), [](const auto& a, const auto& b) { return a.first < b.first; });
  for (auto& [gain, plan] : found) {
    gained += gain;
    plans_.push_back(std::move(plan));
  }
  loads_before_ = loads;
  if (plans_.empty()) return;
  LogInfo("expert group: imbalance {:.2f} on average over the layers; experts of {} layers move, for {:.2f}",
          sum / static_cast<double>(target_.size()), plans_.size(),
          (sum - gained) / static_cast<double>(target_.size()));
}

// Brings what this rank holds towards the target.
void ExpertMover::Follow() {
  const std::optional<std::vector<LayerPlacement>> target = group_.Target();
  if (!target.has_value() || !this->status().ok()) return;
  const std::vector<LayerPlacement> held = group_.HeldNow();
  const RankMask me = RankBit(group_.rank());
  std::vector<Wanted> missing;
  std::vector<Wanted> urgent;  // nobody has it
  std::vector<Wanted> surplus;
  {
    const std::lock_guard lock(mutex_);
    for (size_t l = 0; l < states_.size(); ++l) {
      for (size_t e = 0; e < states_[l].size(); ++e) {
        const Wanted wanted = {static_cast<int32_t>(l), static_cast<int32_t>(e)};
        const bool mine = ((*target)[l][e] & me) != 0;
        if (mine && states_[l][e] == State::kAbsent) {
          (held[l][e] == 0 ? urgent : missing).push_back(wanted);
        } else if (!mine && states_[l][e] == State::kHeld && (held[l][e] & (*target)[l][e] & ~me) != 0) {
          // Whoever shall have it has it already: the old placement was valid until here.
          surplus.push_back(wanted);
        }
      }
    }
  }
  Status status;
  if (!urgent.empty()) {
    LogWarning("expert group: rank {} loads {} experts that were lost", group_.rank(), urgent.size());
    CpuWeightsOptions options;
    options.num_threads = num_threads_;
    status = RunParallel(urgent.size(), 0, options, [&](size_t i, std::vector<float>*) -> StatusOr<size_t> {
      MR_RETURN_IF_ERROR(Load(urgent[i]));
      return 1;
    });
  } else if (!missing.empty()) {
    SetBackground(true);
    status = Load(missing.front());
    SetBackground(false);
  }
  for (const Wanted& wanted : surplus) Drop(wanted);
  if (!urgent.empty() || !missing.empty() || !surplus.empty()) Wake();
  if (status.ok()) return;
  LogError("expert group: rank {}: {}", group_.rank(), Message(status));
  const std::lock_guard lock(mutex_);
  if (status_.ok()) status_ = status;
}

Status ExpertMover::Load(const Wanted& wanted) {
  MR_ASSIGN_OR_RETURN(const std::span<std::byte> memory, TakeSlot());
  const int32_t layer = weights_->config_.num_dense_layers + wanted.layer;
  StatusOr<FfnWeights> ffn = LoadExpert(*options_.source, *weights_, layer, wanted.expert, memory);
  const std::lock_guard lock(mutex_);
  if (!ffn.ok()) {
    free_.push_back(memory.data());
    return ffn.status();
  }
  states_[static_cast<size_t>(wanted.layer)][static_cast<size_t>(wanted.expert)] = State::kComing;
  changes_.push_back({wanted.layer, wanted.expert, *std::move(ffn)});
  has_changes_ = true;
  return OkStatus();
}

void ExpertMover::Drop(const Wanted& wanted) {
  const std::lock_guard lock(mutex_);
  states_[static_cast<size_t>(wanted.layer)][static_cast<size_t>(wanted.expert)] = State::kLeaving;
  changes_.push_back({wanted.layer, wanted.expert, {}});
  has_changes_ = true;
}

StatusOr<std::span<std::byte>> ExpertMover::TakeSlot() {
  const std::lock_guard lock(mutex_);
  if (free_.empty()) {
    MR_ASSIGN_OR_RETURN(HugeMemory slab,
                        HugeMemory::Allocate(kSlabSlots * expert_bytes_, "experts that moved here"));
    for (size_t i = 0; i < kSlabSlots; ++i) free_.push_back(slab.bytes().data() + i * expert_bytes_);
    slabs_.push_back(std::move(slab));
  }
  std::byte* const slot = free_.back();
  free_.pop_back();
  return std::span(slot, expert_bytes_);
}

void ExpertMover::Wake() {
  const std::lock_guard lock(mutex_);
  if (wake_) wake_();
}

}  // namespace millrace::engine
