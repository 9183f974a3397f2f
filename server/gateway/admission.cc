#include "server/gateway/admission.h"

#include <algorithm>
#include <cmath>

namespace millrace::server {
namespace {

constexpr size_t kIdleKeysMax = 4096;
constexpr double kSmoothing = 0.1;   // weight of the newest interval
constexpr double kIntervalMax = 10;  // seconds; an idle hour says nothing of the rate
constexpr int32_t kRetryAfterMax = 60;

}  // namespace

Admission::Ticket& Admission::Ticket::operator=(Ticket&& other) noexcept {
  if (this != &other) {
    Leave(0);
    owner_ = std::exchange(other.owner_, nullptr);
    id_ = other.id_;
  }
  return *this;
}

void Admission::Ticket::Leave(int64_t tokens) {
  if (owner_ == nullptr) return;
  Admission* const owner = std::exchange(owner_, nullptr);
  Decisions decisions;
  {
    std::lock_guard lock(owner->mutex_);
    owner->Remove(id_, tokens, &decisions);
  }
  for (const auto& [decision, status] : decisions) decision(status);
}

Admission::Ticket Admission::Enter(const Request& request, Decision decision) {
  Decisions decisions;
  uint64_t id = 0;
  {
    std::lock_guard lock(mutex_);
    if (waiting_ >= options_.queue_max && !MakeRoom(request.key, &decisions)) {
      decisions.emplace_back(std::move(decision), Full());
    } else {
      id = ++next_id_;
      Entry& entry = entries_[id];
      entry = {request, std::move(decision), id};
      Queue(id, &entry);
      StartWhoFits(&decisions);
    }
  }
  for (const auto& [decide, status] : decisions) decide(status);
  return id == 0 ? Ticket() : Ticket(this, id);
}

Status Admission::Full() const {
  return ResourceExhausted("the gateway's queue is full: {} requests wait, {} choices run", waiting_,
                           running_);
}

void Admission::Queue(uint64_t id, Entry* entry) {
  Key& key = keys_[entry->request.key];
  if (key.active++ == 0) {
    double lowest = HUGE_VAL;
    for (const auto& [name, other] : keys_) {
      if (&other != &key && other.active > 0) lowest = std::min(lowest, other.meter);
    }
    if (lowest < HUGE_VAL) key.meter = std::max(key.meter, lowest);
  }
  const auto before = std::find_if(key.waiting.begin(), key.waiting.end(), [&](uint64_t other) {
    return entries_[other].request.priority < entry->request.priority;
  });
  key.waiting.insert(before, id);
  ++waiting_;
}

bool Admission::MakeRoom(const std::string& newcomer, Decisions* decisions) {
  Key* largest = nullptr;
  for (auto& [name, key] : keys_) {
    if (largest == nullptr || key.waiting.size() > largest->waiting.size()) largest = &key;
  }
  const auto own = keys_.find(newcomer);
  const size_t own_waiting = own == keys_.end() ? 0 : own->second.waiting.size();
  if (largest == nullptr || largest->waiting.size() <= own_waiting + 1) return false;
  const uint64_t victim = largest->waiting.back();
  decisions->emplace_back(entries_[victim].decision, Full());
  Remove(victim, 0, decisions);
  return true;
}

void Admission::StartWhoFits(Decisions* decisions) {
  while (waiting_ > 0) {
    Key* next = nullptr;
    for (auto& [name, key] : keys_) {
      if (!key.waiting.empty() && (next == nullptr || key.meter < next->meter)) next = &key;
    }
    Entry& entry = entries_[next->waiting.front()];
    // A request with more choices than there is room for runs alone.
    if (running_ > 0 && running_ + entry.request.choices > options_.running_max) return;
    next->waiting.pop_front();
    --waiting_;
    running_ += entry.request.choices;
    entry.running = true;
    next->meter += static_cast<double>(entry.request.prompt_tokens);
    decisions->emplace_back(entry.decision, OkStatus());
  }
}

void Admission::Remove(uint64_t id, int64_t tokens, Decisions* decisions) {
  const auto found = entries_.find(id);
  if (found == entries_.end()) return;  // it had to make room
  const Entry& entry = found->second;
  const auto key = keys_.find(entry.request.key);
  if (entry.running) {
    running_ -= entry.request.choices;
    key->second.meter += static_cast<double>(tokens);
    NoteEnd();
  } else {
    key->second.waiting.remove(id);
    --waiting_;
  }
  // An idle key's meter matters only while others are ahead of it: forgetting it is at worst a small gift.
  if (--key->second.active == 0 && keys_.size() > kIdleKeysMax) keys_.erase(key);
  entries_.erase(found);
  StartWhoFits(decisions);
}

void Admission::NoteEnd() {
  const TimePoint now = options_.clock->Now();
  if (last_end_ != TimePoint()) {
    const double interval = std::min(kIntervalMax, std::chrono::duration<double>(now - last_end_).count());
    seconds_per_end_ =
        seconds_per_end_ == 0 ? interval : (1 - kSmoothing) * seconds_per_end_ + kSmoothing * interval;
  }
  last_end_ = now;
}

int32_t Admission::RetryAfterSeconds() const {
  std::lock_guard lock(mutex_);
  const double seconds = std::ceil(seconds_per_end_ * (waiting_ + 1));
  return static_cast<int32_t>(std::clamp(seconds, 1.0, static_cast<double>(kRetryAfterMax)));
}

Admission::Counts Admission::counts() const {
  std::lock_guard lock(mutex_);
  return {waiting_, running_};
}

}  // namespace millrace::server
