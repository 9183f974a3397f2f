#include "engine/kv/page_tiers.h"

#include <algorithm>

#include "base/check.h"
#include "base/digest.h"

namespace millrace::engine {
namespace {

void Smooth(double sample, double* value) { *value = *value == 0 ? sample : 0.8 * *value + 0.2 * sample; }

}  // namespace

PageTiers::PageTiers(size_t page_bytes, int32_t host_slots, std::unique_ptr<PageFile> file,
                     PageCopier* copier, const Clock* clock)
    : page_bytes_(page_bytes),
      host_slots_(host_slots),
      copier_(copier),
      clock_(clock),
      memory_(page_bytes * static_cast<size_t>(host_slots)),
      file_(std::move(file)) {
  MR_CHECK(host_slots > 0);
  for (int32_t slot = host_slots - 1; slot >= 0; --slot) free_host_.push_back(slot);
  if (file_ == nullptr) return;
  for (int32_t slot = file_->num_slots() - 1; slot >= 0; --slot) free_disk_.push_back(slot);
}

PageTiers::~PageTiers() = default;

std::span<std::byte> PageTiers::Slot(int32_t host_slot) {
  return std::span(memory_).subspan(static_cast<size_t>(host_slot) * page_bytes_, page_bytes_);
}

// Most recently used from now on, wherever it is.
void PageTiers::Touch(CachedPage* node) {
  if (node->host_slot >= 0) host_.erase(node->host_use);
  if (node->disk_slot >= 0) disk_.erase(node->disk_use);
  if (node->host_slot >= 0) host_.emplace(node->host_use = ++last_use_, node);
  if (node->disk_slot >= 0) disk_.emplace(node->disk_use = ++last_use_, node);
}

void PageTiers::ReleaseHost(CachedPage* node) {
  if (node->host_slot < 0) return;
  host_.erase(node->host_use);
  free_host_.push_back(std::exchange(node->host_slot, -1));
}

void PageTiers::ReleaseDisk(CachedPage* node) {
  if (node->disk_slot < 0) return;
  disk_.erase(node->disk_use);
  free_disk_.push_back(std::exchange(node->disk_slot, -1));
}

bool PageTiers::Put(CachedPage* node) {
  MR_CHECK(node->page >= 0);
  if (node->host_slot < 0 && node->disk_slot < 0) {
    const int32_t slot = TakeHostSlot();
    if (slot < 0) return false;
    if (!copier_->CopyOut(node->page, Slot(slot))) {
      free_host_.push_back(slot);
      return false;
    }
    node->host_slot = slot;
    host_.emplace(node->host_use = ++last_use_, node);
    ++stats_.spilled;
  }
  Touch(node);
  WriteAhead();
  return true;
}

bool PageTiers::Take(CachedPage* node) {
  MR_CHECK(node->page >= 0 && node->host_slot >= 0);
  const TimePoint begun = clock_->Now();
  if (!copier_->CopyIn(node->page, Slot(node->host_slot))) return false;
  Smooth(Seconds(clock_->Now() - begun), &take_seconds_);
  ++stats_.loaded;
  FreeHost(node);
  return true;
}

void PageTiers::FreeHost(CachedPage* node) {
  if (node->operation == 0) ReleaseHost(node);
}

void PageTiers::Drop(CachedPage* node) {
  if (node->operation != 0) {
    // The file still reads or writes this slot; it is free when that is over.
    Operation& operation = operations_.at(node->operation);
    operation.node = nullptr;
    if (operation.write && node->host_slot >= 0) host_.erase(node->host_use);
    if (!operation.write && node->disk_slot >= 0) disk_.erase(node->disk_use);
    node->operation = 0;
    node->host_slot = operation.write ? -1 : node->host_slot;
    node->disk_slot = operation.write ? node->disk_slot : -1;
  }
  ReleaseHost(node);
  ReleaseDisk(node);
}

void PageTiers::Pin(CachedPage* node, bool pinned) { node->pinned = pinned; }

// Room for one page in host memory, or -1. What is in the pool or in the file too goes first-come; then the
// oldest node that nothing depends on is lost.
int32_t PageTiers::TakeHostSlot() {
  if (free_host_.empty()) {
    CachedPage* victim = nullptr;
    CachedPage* lost = nullptr;
    for (const auto& [use, node] : host_) {
      if (node->pinned || node->operation != 0) continue;
      if (node->page >= 0 || node->disk_slot >= 0) {
        victim = node;
        break;
      }
      if (lost == nullptr && node->children.empty()) lost = node;
    }
    if (victim != nullptr) {
      ReleaseHost(victim);
    } else if (lost != nullptr) {
      cache_->Lose(lost);
    }
  }
  if (free_host_.empty()) return -1;
  const int32_t slot = free_host_.back();
  free_host_.pop_back();
  return slot;
}

int32_t PageTiers::TakeDiskSlot() {
  if (free_disk_.empty()) {
    for (const auto& [use, node] : disk_) {
      if (node->pinned || node->operation != 0) continue;
      if (node->page >= 0 || node->host_slot >= 0) {
        ReleaseDisk(node);
        break;
      }
      if (node->children.empty()) {
        cache_->Lose(node);
        break;
      }
    }
  }
  if (free_disk_.empty()) return -1;
  const int32_t slot = free_disk_.back();
  free_disk_.pop_back();
  return slot;
}

// Keeps half of host memory free or also in the file, so that a burst of pages that must go finds room.
void PageTiers::WriteAhead() {
  if (file_ == nullptr) return;
  const auto wanted = static_cast<size_t>((host_slots_ + 1) / 2);
  size_t ready = free_host_.size();
  std::vector<CachedPage*> oldest;
  for (const auto& [use, node] : host_) {
    if (ready >= wanted) break;
    ++ready;
    if (node->disk_slot < 0 && node->page < 0 && node->operation == 0) oldest.push_back(node);
  }
  for (CachedPage* const node : oldest) {
    node->pinned = true;  // while room in the file is made
    const int32_t slot = TakeDiskSlot();
    node->pinned = false;
    if (slot < 0) return;
    const auto bytes = Slot(node->host_slot);
    node->checksum = Xxh3(bytes, node->key);
    const uint64_t tag = next_tag_++;
    if (!file_->Write(slot, bytes, tag)) return free_disk_.push_back(slot);
    node->operation = tag;
    operations_.emplace(tag, Operation{node, true, node->host_slot, slot, clock_->Now()});
  }
}

bool PageTiers::Fetch(CachedPage* node) {
  MR_CHECK(node->page < 0 && node->host_slot < 0 && node->disk_slot >= 0);
  if (node->operation != 0) return true;
  const bool pinned = std::exchange(node->pinned, true);
  const int32_t slot = TakeHostSlot();
  node->pinned = pinned;
  if (slot < 0) return false;
  const uint64_t tag = next_tag_++;
  if (!file_->Read(node->disk_slot, Slot(slot), tag)) {
    free_host_.push_back(slot);
    return false;
  }
  node->operation = tag;
  operations_.emplace(tag, Operation{node, false, slot, node->disk_slot, clock_->Now()});
  return true;
}

void PageTiers::Poll() {
  if (file_ == nullptr || operations_.empty()) return;
  std::vector<PageFile::Done> done;
  file_->Poll(&done);
  for (const PageFile::Done& each : done) {
    const auto found = operations_.find(each.tag);
    MR_CHECK(found != operations_.end(), "operation {}", each.tag);
    const Operation operation = found->second;
    operations_.erase(found);
    if (operation.node != nullptr) operation.node->operation = 0;
    if (!each.ok) ++stats_.disk_failures;
    operation.write ? FinishWrite(operation, each.ok) : FinishRead(operation, each.ok);
  }
  if (!done.empty()) WriteAhead();
}

void PageTiers::FinishWrite(const Operation& operation, bool ok) {
  CachedPage* const node = operation.node;
  if (node == nullptr) {
    free_host_.push_back(operation.host_slot);
    free_disk_.push_back(operation.disk_slot);
    return;
  }
  if (!ok) return free_disk_.push_back(operation.disk_slot);  // host memory still has it
  node->disk_slot = operation.disk_slot;
  disk_.emplace(node->disk_use = ++last_use_, node);
  ++stats_.written;
}

void PageTiers::FinishRead(const Operation& operation, bool ok) {
  CachedPage* const node = operation.node;
  if (node == nullptr) {
    free_host_.push_back(operation.host_slot);
    free_disk_.push_back(operation.disk_slot);
    return;
  }
  if (ok && Xxh3(Slot(operation.host_slot), node->key) != node->checksum) {
    ++stats_.disk_failures;
    ok = false;
  }
  if (!ok) {
    free_host_.push_back(operation.host_slot);
    if (node->page >= 0) return ReleaseDisk(node);
    return cache_->Lose(node);
  }
  // Reads overlap: from the end of the one before, or from its own beginning.
  const TimePoint now = clock_->Now();
  Smooth(Seconds(now - std::max(operation.begun, last_fetch_end_)), &fetch_seconds_);
  last_fetch_end_ = now;
  ++stats_.fetched;
  node->host_slot = operation.host_slot;
  host_.emplace(node->host_use = ++last_use_, node);
}

TierStats PageTiers::Stats() const {
  TierStats stats = stats_;
  stats.host_pages = static_cast<int32_t>(host_.size());
  stats.disk_pages = static_cast<int32_t>(disk_.size());
  return stats;
}

void PageTiers::CheckInvariants() const {
  size_t host = host_.size() + free_host_.size();
  size_t disk = disk_.size() + free_disk_.size();
  for (const auto& [use, node] : host_)
    MR_CHECK(node->host_use == use && node->host_slot >= 0 && !node->pinned);
  for (const auto& [use, node] : disk_) MR_CHECK(node->disk_use == use && node->disk_slot >= 0);
  for (const auto& [tag, operation] : operations_) {
    MR_CHECK(operation.node == nullptr || operation.node->operation == tag);
    // A read's slot in memory and a write's slot in the file belong to the operation; of a forgotten node,
    // both.
    if (!operation.write || operation.node == nullptr) ++host;
    if (operation.write || operation.node == nullptr) ++disk;
  }
  MR_CHECK(host == static_cast<size_t>(host_slots_), "{} of {} slots of host memory", host, host_slots_);
  MR_CHECK(file_ == nullptr || disk == static_cast<size_t>(file_->num_slots()), "{} slots of the file", disk);
}

}  // namespace millrace::engine
