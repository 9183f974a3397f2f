#include "transfer/memory_table.h"

#include <algorithm>

#include "base/check.h"

namespace millrace::transfer {
namespace {

bool Within(uint64_t offset, uint64_t bytes, uint64_t size) {
  return bytes <= size && offset <= size - bytes;
}

}  // namespace

RegionId MemoryTable::Register(std::span<std::byte> memory, bool writable) {
  const std::lock_guard lock(mutex_);
  const RegionId id = next_region_++;
  regions_[id] = {memory, writable, 0};
  return id;
}

Status MemoryTable::Deregister(RegionId region) {
  const std::lock_guard lock(mutex_);
  const auto found = regions_.find(region);
  if (found == regions_.end()) return NotFound("region {} is not registered", region);
  if (found->second.uses > 0) {
    return FailedPrecondition("region {} is named by {} tickets or requests", region, found->second.uses);
  }
  regions_.erase(found);
  return OkStatus();
}

namespace {

// The extent of all pieces of an intent, or false when it is empty or cannot be told in 64 bits.
bool Extent(const Intent& intent, uint64_t* bytes) {
  if (intent.local.bytes == 0 || intent.count == 0) return false;
  const uint64_t steps = intent.count - 1;
  uint64_t last = 0;
  return !__builtin_mul_overflow(steps, intent.local_stride, &last) &&
         !__builtin_add_overflow(last, intent.local.bytes, bytes);
}

}  // namespace

Status MemoryTable::UseLocal(std::span<const Intent> intents, std::vector<std::byte*>* bases,
                             std::vector<RegionId>* regions, bool* writable) {
  const std::lock_guard lock(mutex_);
  bases->reserve(intents.size());
  RegionId last = 0;
  Region* region = nullptr;
  std::vector<RegionId> used;
  for (const Intent& intent : intents) {
    if (region == nullptr || intent.local.region != last) {
      last = intent.local.region;
      const auto found = regions_.find(last);
      if (found == regions_.end()) return InvalidArgument("local region {} is not registered", last);
      region = &found->second;
      if (std::find(used.begin(), used.end(), last) == used.end()) used.push_back(last);
      *writable = *writable && region->writable;
    }
    uint64_t bytes = 0;
    if (!Extent(intent, &bytes) || !Within(intent.local.offset, bytes, region->memory.size())) {
      return InvalidArgument("local range {}+{} (x {}, every {}) is empty or outside region {} of {} bytes",
                             intent.local.offset, intent.local.bytes, intent.count, intent.local_stride, last,
                             region->memory.size());
    }
    bases->push_back(region->memory.data() + intent.local.offset);
  }
  for (const RegionId id : used) ++regions_.at(id).uses;
  *regions = std::move(used);
  return OkStatus();
}

void MemoryTable::ReleaseLocal(std::span<const RegionId> regions) {
  const std::lock_guard lock(mutex_);
  for (const RegionId region : regions) --regions_.at(region).uses;
}

Status MemoryTable::AddRanges(Ticket& ticket, std::vector<Range> ranges) {
  for (const Range& range : ranges) {
    const auto found = regions_.find(range.region);
    if (found == regions_.end()) return InvalidArgument("region {} is not registered", range.region);
    if (ticket.operation == Operation::kWrite && !found->second.writable)
      return InvalidArgument("region {} is not writable for peers", range.region);
    if (range.bytes == 0 || !Within(range.offset, range.bytes, found->second.memory.size())) {
      return InvalidArgument("range {}+{} is empty or outside region {}", range.offset, range.bytes,
                             range.region);
    }
  }
  for (const Range& range : ticket.ranges) --regions_.at(range.region).uses;
  ticket.ranges.insert(ticket.ranges.end(), ranges.begin(), ranges.end());
  std::sort(ticket.ranges.begin(), ticket.ranges.end(), [](const Range& a, const Range& b) {
    return a.region != b.region ? a.region < b.region : a.offset < b.offset;
  });
  std::vector<Range> joined;
  for (const Range& range : ticket.ranges) {
    if (!joined.empty() && joined.back().region == range.region &&
        joined.back().offset + joined.back().bytes >= range.offset) {
      joined.back().bytes = std::max(joined.back().bytes, range.offset + range.bytes - joined.back().offset);
    } else {
      joined.push_back(range);
    }
  }
  ticket.ranges = std::move(joined);
  for (const Range& range : ticket.ranges) ++regions_.at(range.region).uses;
  return OkStatus();
}

StatusOr<TicketId> MemoryTable::Open(uint64_t peer_epoch, std::vector<Range> ranges, Operation operation) {
  const std::lock_guard lock(mutex_);
  Ticket ticket;
  ticket.operation = operation;
  ticket.peer_epoch = peer_epoch;
  MR_RETURN_IF_ERROR(AddRanges(ticket, std::move(ranges)));
  const TicketId id = next_ticket_++;
  tickets_.emplace(id, std::move(ticket));
  return id;
}

Status MemoryTable::Extend(TicketId id, std::vector<Range> ranges) {
  const std::lock_guard lock(mutex_);
  const auto found = tickets_.find(id);
  if (found == tickets_.end() || found->second.closing) return NotFound("ticket {} is not open", id);
  return AddRanges(found->second, std::move(ranges));
}

// Callers run the callbacks after letting go of the mutex.
std::vector<TicketDone> MemoryTable::RemoveIfDrained(TicketId id) {
  const auto found = tickets_.find(id);
  Ticket& ticket = found->second;
  if (!ticket.closing || ticket.pins > 0) return {};
  for (const Range& range : ticket.ranges) --regions_.at(range.region).uses;
  std::vector<TicketDone> waiting = std::move(ticket.waiting);
  tickets_.erase(found);
  return waiting;
}

bool MemoryTable::Close(TicketId id, TicketDone done) {
  std::vector<TicketDone> ready;
  bool pinned = false;
  {
    const std::lock_guard lock(mutex_);
    const auto found = tickets_.find(id);
    if (found == tickets_.end()) {
      ready.push_back(std::move(done));
    } else {
      found->second.closing = true;
      found->second.waiting.push_back(std::move(done));
      pinned = found->second.pins > 0;
      ready = RemoveIfDrained(id);
    }
  }
  for (TicketDone& callback : ready) std::move(callback)();
  return pinned;
}

StatusOr<MemoryTable::Ticket*> MemoryTable::FindOpen(uint64_t peer_epoch, TicketId id) {
  const auto found = tickets_.find(id);
  if (found == tickets_.end()) return PermissionDenied("there is no ticket {}", id);
  if (found->second.closing) return PermissionDenied("ticket {} is closed", id);
  if (found->second.peer_epoch != peer_epoch) return PermissionDenied("ticket {} is another peer's", id);
  return &found->second;
}

StatusOr<MemoryTable::Grant> MemoryTable::PinTicket(uint64_t peer_epoch, TicketId id) {
  const std::lock_guard lock(mutex_);
  MR_ASSIGN_OR_RETURN(Ticket* const ticket, FindOpen(peer_epoch, id));
  ++ticket->pins;
  return Grant{ticket->operation, ticket->ranges};
}

StatusOr<std::byte*> MemoryTable::Admit(uint64_t peer_epoch, TicketId id, Operation operation,
                                        RegionId region, uint64_t offset, uint32_t length) {
  const std::lock_guard lock(mutex_);
  MR_ASSIGN_OR_RETURN(Ticket* const open, FindOpen(peer_epoch, id));
  Ticket& ticket = *open;
  if (ticket.operation != operation)
    return PermissionDenied("ticket {} is not for a {}", id, Name(operation));
  const auto after =
      std::upper_bound(ticket.ranges.begin(), ticket.ranges.end(), std::pair(region, offset),
                       [](const auto& at, const Range& range) {
                         return at.first != range.region ? at.first < range.region : at.second < range.offset;
                       });
  if (after == ticket.ranges.begin())
    return PermissionDenied("ticket {} does not grant offset {}", id, offset);
  const Range& range = *std::prev(after);
  if (range.region != region || !Within(offset - range.offset, length, range.bytes)) {
    return PermissionDenied("ticket {} does not grant {}+{} of region {}", id, offset, length, region);
  }
  ++ticket.pins;
  return regions_.at(region).memory.data() + offset;
}

void MemoryTable::Unpin(TicketId id) {
  std::vector<TicketDone> ready;
  {
    const std::lock_guard lock(mutex_);
    Ticket& ticket = tickets_.at(id);
    MR_CHECK(ticket.pins > 0);
    --ticket.pins;
    ready = RemoveIfDrained(id);
  }
  for (TicketDone& callback : ready) std::move(callback)();
}

bool MemoryTable::IsClosing(TicketId id) const {
  const std::lock_guard lock(mutex_);
  const auto found = tickets_.find(id);
  return found == tickets_.end() || found->second.closing;
}

std::vector<TicketId> MemoryTable::CloseAll() {
  std::vector<TicketId> ids;
  std::vector<TicketId> pinned;
  {
    const std::lock_guard lock(mutex_);
    for (const auto& [id, ticket] : tickets_) ids.push_back(id);
  }
  std::sort(ids.begin(), ids.end());
  for (const TicketId id : ids) {
    if (Close(id, [] {})) pinned.push_back(id);
  }
  return pinned;
}

int32_t MemoryTable::num_open() const {
  const std::lock_guard lock(mutex_);
  return static_cast<int32_t>(tickets_.size());
}

int32_t MemoryTable::num_draining() const {
  const std::lock_guard lock(mutex_);
  return static_cast<int32_t>(std::count_if(tickets_.begin(), tickets_.end(),
                                            [](const auto& entry) { return entry.second.closing; }));
}

}  // namespace millrace::transfer
