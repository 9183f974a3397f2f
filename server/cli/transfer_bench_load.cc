#include "server/cli/transfer_bench_load.h"

#include <algorithm>
#include <cstring>
#include <numeric>

#include "base/random.h"
#include "base/thread.h"
#include "server/cli/transfer_bench_pattern.h"

namespace millrace::server {
namespace {

constexpr Duration kTransferDeadline = std::chrono::seconds(30);
constexpr Duration kReconnectPause = std::chrono::milliseconds(20);

TimePoint Now() { return Clock::System().Now(); }

}  // namespace

void BenchTally::Merge(const BenchTally& other) {
  latency.Merge(other.latency);
  submit.Merge(other.submit);
  bytes += other.bytes;
  transfers += other.transfers;
  wrong_bytes += other.wrong_bytes;
  checked_bytes += other.checked_bytes;
  for (const auto& [message, count] : other.errors) errors[message] += count;
  losses.insert(losses.end(), other.losses.begin(), other.losses.end());
}

BenchThread::BenchThread(transfer::Transfer* transfer, HostPort target, const BenchLoad& load,
                         BenchWindow* window, uint64_t seed)
    : transfer_(transfer), target_(std::move(target)), load_(load), window_(window), seed_(seed) {
  const auto depth = static_cast<size_t>(load_.depth);
  positions_ = std::max(depth, load_.memory_bytes / load_.transfer_bytes());
  positions_ -= positions_ % depth;
  places_.resize(static_cast<size_t>(load_.batch));
  std::iota(places_.begin(), places_.end(), size_t{0});
  if (load_.scatter) {
    Random random(seed);
    for (size_t i = places_.size() - 1; i > 0; --i) std::swap(places_[i], places_[random.Below(i + 1)]);
  }
  slots_.resize(depth);
  for (size_t i = 0; i < depth; ++i) {
    slots_[i].position = i;
    slots_[i].reads = load_.op == BenchLoad::Op::kRead || (load_.op == BenchLoad::Op::kMixed && i % 2 == 1);
  }
}

BenchThread::~BenchThread() {
  if (thread_.joinable()) thread_.join();
  Release();
}

Status BenchThread::Connect() {
  if (region_ == 0) {
    MR_ASSIGN_OR_RETURN(memory_, BenchMemory::Allocate(positions_ * load_.transfer_bytes()));
    MR_ASSIGN_OR_RETURN(region_, transfer_->Register(memory_.bytes(), /*writable=*/true));
  }
  MR_ASSIGN_OR_RETURN(BenchControl control, BenchControl::Connect(target_));
  const uint64_t epoch = transfer_->epoch();
  std::string epoch_bytes(sizeof(epoch), '\0');
  std::memcpy(epoch_bytes.data(), &epoch, sizeof(epoch));
  MR_ASSIGN_OR_RETURN(
      const Json answer,
      control.Ask(
          {{"open", {{"bytes", memory_.bytes().size()}, {"seed", seed_}, {"epoch", ToHex(epoch_bytes)}}}}));
  MR_ASSIGN_OR_RETURN(const auto descriptor, GetString(answer, "descriptor"));
  MR_ASSIGN_OR_RETURN(const auto region, GetInt(answer, "region"));
  MR_ASSIGN_OR_RETURN(const auto write_ticket, GetInt(answer, "write_ticket"));
  MR_ASSIGN_OR_RETURN(const auto read_ticket, GetInt(answer, "read_ticket"));
  if (!descriptor || !region || !write_ticket || !read_ticket)
    return InvalidArgument("the target's answer lacks a field");
  MR_ASSIGN_OR_RETURN(const std::string descriptor_bytes, FromHex(*descriptor));
  MR_ASSIGN_OR_RETURN(peer_, transfer_->Open(descriptor_bytes));
  remote_region_ = static_cast<transfer::RegionId>(*region);
  write_ticket_ = static_cast<transfer::TicketId>(*write_ticket);
  read_ticket_ = static_cast<transfer::TicketId>(*read_ticket);
  prepared_.assign(positions_, nullptr);
  control_ = std::move(control);
  return OkStatus();
}

void BenchThread::Start() {
  thread_ = std::thread([this] { Run(); });
}

BenchTally BenchThread::Finish() {
  thread_.join();
  return std::move(tally_);
}

void BenchThread::Run() {
  SetThreadName("bench-load");
  while (!window_->stopping) {
    lost_ = false;
    for (size_t slot = 0; slot < slots_.size() && !lost_; ++slot) Submit(slot);
    std::vector<Completion> arrived;
    while (in_flight_ > 0) {
      {
        std::unique_lock lock(mutex_);
        some_.wait(lock, [this] { return !completions_.empty(); });
        arrived.swap(completions_);
      }
      in_flight_ -= static_cast<int>(arrived.size());
      for (const Completion& completion : arrived) {
        Account(completion);
        if (!window_->stopping && !lost_) Submit(completion.slot);
      }
      arrived.clear();
    }
    if (!lost_) continue;
    if (!load_.reconnect) return;
    FindAgain();
  }
}

// The peer is gone for good: everything that was in flight has ended.
void BenchThread::FindAgain() {
  BenchLoss loss;
  loss.lost_seconds = SinceStart();
  while (!window_->stopping) {
    if (Connect().ok()) {
      loss.back_seconds = SinceStart();
      break;
    }
    std::this_thread::sleep_for(kReconnectPause);
  }
  tally_.losses.push_back(loss);
}

double BenchThread::SinceStart() const {
  return window_->measuring.load(std::memory_order_acquire) ? Seconds(Now() - window_->start) : 0;
}

std::vector<transfer::Intent> BenchThread::Intents(const Slot& slot) const {
  const uint64_t area = AreaOffset(slot);
  const uint64_t block = load_.block_bytes;
  if (!load_.scatter) {
    const auto count = static_cast<uint32_t>(places_.size());
    return {{{region_, area, block}, remote_region_, area, count, block, block}};
  }
  std::vector<transfer::Intent> intents(places_.size());
  for (size_t i = 0; i < places_.size(); ++i)
    intents[i] = {{region_, area + i * block, block}, remote_region_, area + places_[i] * block};
  return intents;
}

Status BenchThread::Describe(const Slot& slot, transfer::Request* request) {
  request->operation = slot.reads ? transfer::Operation::kRead : transfer::Operation::kWrite;
  request->ticket = slot.reads ? read_ticket_ : write_ticket_;
  request->priority = load_.priority;
  if (!load_.prepare) {
    request->intents = Intents(slot);
    return OkStatus();
  }
  auto& prepared = prepared_[slot.position];
  if (prepared == nullptr) {
    MR_ASSIGN_OR_RETURN(prepared, transfer_->Prepare(Intents(slot)));
  }
  request->prepared = prepared;
  return OkStatus();
}

// The bytes that a write should bring, or what a read should overwrite.
void BenchThread::FillSource(const Slot& slot) {
  const uint64_t area = AreaOffset(slot);
  for (size_t i = 0; i < places_.size(); ++i) {
    const auto block = memory_.bytes().subspan(area + i * load_.block_bytes, load_.block_bytes);
    BenchPattern(seed_, slot.round).Fill(block, area + places_[i] * load_.block_bytes);
  }
}

void BenchThread::Submit(size_t index) {
  Slot& slot = slots_[index];
  slot.position = (slot.position + slots_.size()) % positions_;
  slot.round = ++round_;
  if (load_.check) FillSource(slot);
  transfer::Request request;
  Status status = Describe(slot, &request);
  slot.submitted = Now();
  request.deadline = slot.submitted + kTransferDeadline;
  if (status.ok()) {
    status = transfer_->Submit(peer_, std::move(request),
                               [this, index](Status result) { Complete(index, std::move(result)); });
  }
  if (window_->measuring) tally_.submit.Record((Now() - slot.submitted).count());
  if (status.ok()) {
    ++in_flight_;
    return;
  }
  lost_ = true;
  if (!load_.reconnect || !absl::IsNotFound(status)) CountError(status);  // not found: lost a moment ago
}

void BenchThread::Complete(size_t slot, Status status) {
  const TimePoint at = Now();
  const std::lock_guard lock(mutex_);
  completions_.push_back({slot, std::move(status), at});
  some_.notify_one();
}

void BenchThread::Account(const Completion& completion) {
  const Slot& slot = slots_[completion.slot];
  if (!completion.status.ok()) {
    lost_ = true;
    // What a dead process still owed is the loss itself, counted there.
    if (!load_.reconnect || !absl::IsUnavailable(completion.status)) CountError(completion.status);
    return;
  }
  if (window_->measuring.load(std::memory_order_acquire) && !window_->stopping) {
    const uint64_t bytes = load_.transfer_bytes();
    tally_.latency.Record((completion.at - slot.submitted).count());
    tally_.bytes += bytes;
    ++tally_.transfers;
    window_->bytes += bytes;
    if (window_->bucket > Duration::zero()) {
      const auto bucket = static_cast<size_t>((completion.at - window_->start) / window_->bucket);
      if (bucket < window_->timeline.size()) window_->timeline[bucket] += bytes;
    }
  }
  if (load_.check) slot.reads ? CheckRead(slot) : CheckWrite(slot);
}

// The target's memory holds round 0 where nobody writes.
void BenchThread::CheckRead(const Slot& slot) {
  const uint64_t area = AreaOffset(slot);
  for (size_t i = 0; i < places_.size(); ++i) {
    const auto block = memory_.bytes().subspan(area + i * load_.block_bytes, load_.block_bytes);
    tally_.wrong_bytes += BenchPattern(seed_, 0).CountWrong(block, area + places_[i] * load_.block_bytes);
  }
  tally_.checked_bytes += load_.transfer_bytes();
}

void BenchThread::CheckWrite(const Slot& slot) {
  const uint64_t bytes = load_.transfer_bytes();
  const auto answer =
      control_->Ask({{"check", {{"offset", AreaOffset(slot)}, {"bytes", bytes}, {"round", slot.round}}}});
  if (!answer.ok()) {
    lost_ = true;
    if (!load_.reconnect) CountError(answer.status());
    return;
  }
  const auto wrong = GetInt(*answer, "wrong");
  if (!wrong.ok() || !wrong->has_value()) return CountError(InvalidArgument("a check without an answer"));
  tally_.wrong_bytes += static_cast<uint64_t>(**wrong);
  tally_.checked_bytes += bytes;
}

void BenchThread::CountError(const Status& status) { ++tally_.errors[std::string(Message(status))]; }

void BenchThread::Release() {
  control_.reset();                                        // the target closes the ticket
  if (region_ != 0) (void)transfer_->Deregister(region_);  // nothing names it: every transfer has ended
  region_ = 0;
}

}  // namespace millrace::server
