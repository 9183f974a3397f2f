#include "transfer/slice_queue.h"

#include <algorithm>

#include "base/check.h"

namespace millrace::transfer {

void SliceQueue::Add(WriteRequest request, std::vector<std::span<const std::byte>> sources, WriteDone done) {
  const uint64_t id = next_write_++;
  auto write = std::make_unique<Write>();
  write->key = {-request.priority, request.deadline, id};
  write->request = std::move(request);
  write->sources = std::move(sources);
  write->done = std::move(done);
  for (const auto& source : write->sources) write->bytes_left += source.size();
  ready_.insert(write->key);
  writes_.emplace(id, std::move(write));
}

Slice SliceQueue::Take() {
  if (!resend_.empty()) {
    Slice slice = resend_.front();
    resend_.pop_front();
    ++writes_.at(slice.write)->in_flight;
    return slice;
  }
  Write& write = *writes_.at(ready_.begin()->id);
  const auto source = write.sources[write.intent];
  const uint64_t bytes = std::min<uint64_t>(slice_bytes_max_, source.size() - write.offset);
  Slice slice;
  slice.id = next_slice_++;
  slice.write = write.key.id;
  slice.bytes = source.subspan(write.offset, bytes);
  slice.ticket = write.request.ticket;
  slice.remote_region = write.request.intents[write.intent].remote_region;
  slice.remote_offset = write.request.intents[write.intent].remote_offset + write.offset;
  ++write.in_flight;
  write.offset += bytes;
  if (write.offset == source.size()) {
    ++write.intent;
    write.offset = 0;
    if (write.intent == write.sources.size()) ready_.erase(ready_.begin());
  }
  return slice;
}

void SliceQueue::Landed(const Slice& slice) {
  Write& write = *writes_.at(slice.write);
  --write.in_flight;
  write.bytes_left -= slice.bytes.size();
  EndIfOver(slice.write);
}

void SliceQueue::Return(const Slice& slice) {
  Write& write = *writes_.at(slice.write);
  --write.in_flight;
  if (write.failure.ok()) resend_.push_back(slice);
  EndIfOver(slice.write);
}

void SliceQueue::Fail(const Slice& slice, const Status& status) {
  Write& write = *writes_.at(slice.write);
  --write.in_flight;
  FailWrite(write, status);
}

// Nothing more of it is taken; it ends when nothing of it is in flight.
void SliceQueue::FailWrite(Write& write, const Status& status) {
  const uint64_t id = write.key.id;
  if (write.failure.ok()) {
    write.failure = status;
    ready_.erase(write.key);
    std::erase_if(resend_, [id](const Slice& slice) { return slice.write == id; });
  }
  EndIfOver(id);
}

void SliceQueue::EndIfOver(uint64_t id) {
  const auto found = writes_.find(id);
  Write& write = *found->second;
  const bool over = write.failure.ok() ? write.bytes_left == 0 : write.in_flight == 0;
  if (!over) return;
  MR_CHECK(write.in_flight == 0, "a write ended with {} slices in flight", write.in_flight);
  const std::unique_ptr<Write> ended = std::move(found->second);
  writes_.erase(found);
  for (const Intent& intent : ended->request.intents) memory_->ReleaseSource(intent.source.region);
  std::move(ended->done)(ended->failure);
  CheckFences();
}

void SliceQueue::FailAll(const Status& status) {
  std::vector<uint64_t> ids;
  for (const auto& [id, write] : writes_) ids.push_back(id);
  std::sort(ids.begin(), ids.end());
  for (const uint64_t id : ids) FailWrite(*writes_.at(id), status);
}

void SliceQueue::FailExpired(TimePoint now) {
  std::vector<uint64_t> ids;
  for (const auto& [id, write] : writes_) {
    if (write->request.deadline <= now && write->failure.ok()) ids.push_back(id);
  }
  for (const uint64_t id : ids) FailWrite(*writes_.at(id), DeadlineExceeded("the write's deadline passed"));
}

void SliceQueue::Cancel(TicketId ticket, TicketDone done) {
  std::vector<uint64_t> ids;
  for (const auto& [id, write] : writes_) {
    if (write->request.ticket == ticket) ids.push_back(id);
  }
  fences_.emplace_back(ticket, std::move(done));
  for (const uint64_t id : ids) FailWrite(*writes_.at(id), Cancelled("the write was cancelled"));
  CheckFences();
}

void SliceQueue::CheckFences() {
  for (size_t i = 0; i < fences_.size();) {
    const TicketId ticket = fences_[i].first;
    const bool busy = std::any_of(writes_.begin(), writes_.end(), [ticket](const auto& entry) {
      return entry.second->request.ticket == ticket;
    });
    if (busy) {
      ++i;
      continue;
    }
    TicketDone done = std::move(fences_[i].second);
    fences_.erase(fences_.begin() + static_cast<ptrdiff_t>(i));
    std::move(done)();
  }
}

TimePoint SliceQueue::NextDeadline() const {
  TimePoint next = kNoDeadline;
  for (const auto& [id, write] : writes_) next = std::min(next, write->request.deadline);
  return next;
}

}  // namespace millrace::transfer
