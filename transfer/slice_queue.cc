#include "transfer/slice_queue.h"

#include <algorithm>

#include "base/check.h"

namespace millrace::transfer {
namespace {

// A request without a deadline is due when this rate would have carried it: an eighth of a 1 GB/s link.
constexpr double kFairBytesPerSecond = 125e6;
constexpr Duration kDueMax = std::chrono::seconds(10);

TimePoint Due(TimePoint now, TimePoint deadline, uint64_t bytes, int32_t priority) {
  const auto fair = std::min<Duration>(
      kDueMax, Duration(static_cast<int64_t>(static_cast<double>(bytes) / kFairBytesPerSecond * 1e9)));
  return std::min(deadline, now + fair) - std::clamp(priority, -kPriorityMax, kPriorityMax) * kPriorityStep;
}

}  // namespace

void SliceQueue::Add(Operation operation, TicketId ticket, int32_t priority, TimePoint now,
                     TimePoint deadline, std::shared_ptr<IntentList> intents, RequestDone done) {
  const uint64_t id = next_request_++;
  const uint64_t bytes = intents->bytes();
  const IntentCursor cursor(intents.get());
  auto request = std::make_unique<Pending>(Pending{{Due(now, deadline, bytes, priority), id},
                                                   operation,
                                                   ticket,
                                                   deadline,
                                                   std::move(intents),
                                                   std::move(done),
                                                   cursor,
                                                   bytes,
                                                   0,
                                                   OkStatus()});
  ready_.insert(request->key);
  if (deadline != kNoDeadline) deadlines_.insert({deadline, id});
  bytes_waiting_ += bytes;
  ++tickets_[ticket];
  requests_.emplace(id, std::move(request));
}

bool SliceQueue::NextIsExpress() const {
  if (!again_.empty()) return slices_.at(again_.front()).slice.express;
  return requests_.at(ready_.begin()->second)->intents->bytes() <= kExpressBytesMax;
}

Slice SliceQueue::Take(uint64_t bytes_max) {
  if (!again_.empty()) {
    Live& live = slices_.at(again_.front());
    again_.pop_front();
    live.waiting = live.landed = live.doubtful = false;
    live.copies = 1;
    ++live.slice.attempt;
    bytes_waiting_ -= live.slice.local.size();
    live.slice.retired_below = RetiredBelow();
    return live.slice;
  }
  Pending& request = *requests_.at(ready_.begin()->second);
  Slice slice;
  slice.express = NextIsExpress();
  slice.id = next_slice_++;
  slice.request = request.key.second;
  slice.operation = request.operation;
  slice.ticket = request.ticket;
  request.cursor.Cut(bytes_max, &slice);
  request.bytes_uncut -= slice.local.size();
  bytes_waiting_ -= slice.local.size();
  ++request.slices;
  if (request.bytes_uncut == 0) ready_.erase(ready_.begin());
  Live& live = slices_[slice.id];
  live.slice = slice;
  live.copies = 1;
  slice.retired_below = RetiredBelow();
  return slice;
}

Slice SliceQueue::Copy(uint64_t id) {
  Live& live = slices_.at(id);
  MR_CHECK(live.copies > 0);
  ++live.copies;
  ++live.slice.attempt;
  if (live.slice.operation == Operation::kWrite) live.landed = false;
  live.slice.retired_below = RetiredBelow();
  return live.slice;
}

bool SliceQueue::Wanted(uint64_t id) const {
  const auto found = slices_.find(id);
  return found != slices_.end() && !found->second.landed &&
         requests_.at(found->second.slice.request)->failure.ok();
}

void SliceQueue::Done(uint64_t id, uint32_t attempt, SliceOutcome outcome) {
  Live& live = slices_.at(id);
  MR_CHECK(live.copies > 0 && !live.waiting);
  --live.copies;
  Pending& request = *requests_.at(live.slice.request);
  const bool landed = outcome == SliceOutcome::kLanded;
  if (live.slice.operation == Operation::kRead) {
    live.landed |= landed;
    live.doubtful |= !landed;
  } else if (attempt == live.slice.attempt) {
    live.landed = landed;
  }
  if (outcome == SliceOutcome::kRefused && request.failure.ok()) {
    FailRequest(request,
                PermissionDenied("the {} of {} bytes under ticket {} was refused: closed, unknown or "
                                 "not granted",
                                 Name(live.slice.operation), live.slice.local.size(), live.slice.ticket));
  }
  Live& now = slices_.at(id);  // failing the request may have moved it
  if (now.copies > 0) return;
  if ((now.landed && !now.doubtful) || !request.failure.ok()) return EndSlice(id);
  now.waiting = true;
  bytes_waiting_ += now.slice.local.size();
  again_.push_back(id);
}

void SliceQueue::EndSlice(uint64_t id) {
  const Live& live = slices_.at(id);
  const uint64_t request = live.slice.request;
  if (live.waiting) {
    bytes_waiting_ -= live.slice.local.size();
    std::erase(again_, id);
  }
  slices_.erase(id);
  --requests_.at(request)->slices;
  EndIfOver(request);
}

// Nothing more of it is taken; it ends when no copy of its slices is in flight.
void SliceQueue::FailRequest(Pending& request, const Status& status) {
  if (!request.failure.ok()) return;
  const uint64_t id = request.key.second;
  request.failure = status;
  ready_.erase(request.key);
  bytes_waiting_ -= std::exchange(request.bytes_uncut, 0);
  std::vector<uint64_t> idle;
  for (const uint64_t slice : again_) {
    if (slices_.at(slice).slice.request == id) idle.push_back(slice);
  }
  ++request.slices;  // keeps it alive through the loop
  for (const uint64_t slice : idle) EndSlice(slice);
  --request.slices;
  EndIfOver(id);
}

void SliceQueue::EndIfOver(uint64_t id) {
  const auto found = requests_.find(id);
  Pending& request = *found->second;
  if (request.bytes_uncut > 0 || request.slices > 0) return;
  const std::unique_ptr<Pending> ended = std::move(found->second);
  requests_.erase(found);
  if (ended->deadline != kNoDeadline) deadlines_.erase({ended->deadline, id});
  const auto ticket = tickets_.find(ended->ticket);
  if (--ticket->second == 0) tickets_.erase(ticket);
  ended->intents.reset();
  std::move(ended->done)(ended->failure);
  CheckFences();
}

void SliceQueue::FailAll(const Status& status) {
  std::vector<uint64_t> ids;
  for (const auto& [id, request] : requests_) ids.push_back(id);
  std::sort(ids.begin(), ids.end());
  for (const uint64_t id : ids) FailRequest(*requests_.at(id), status);
}

void SliceQueue::EndAll() {
  std::vector<uint64_t> ids;
  for (const auto& [id, live] : slices_) ids.push_back(id);
  for (const uint64_t id : ids) EndSlice(id);
}

void SliceQueue::FailExpired(TimePoint now) {
  while (!deadlines_.empty() && deadlines_.begin()->first <= now) {
    const uint64_t id = deadlines_.begin()->second;
    Pending& request = *requests_.at(id);
    deadlines_.erase(deadlines_.begin());
    request.deadline = kNoDeadline;
    FailRequest(request, DeadlineExceeded("the deadline passed"));
  }
}

void SliceQueue::Cancel(TicketId ticket, TicketDone done) {
  std::vector<uint64_t> ids;
  for (const auto& [id, request] : requests_) {
    if (request->ticket == ticket) ids.push_back(id);
  }
  std::sort(ids.begin(), ids.end());
  fences_.emplace_back(ticket, std::move(done));
  for (const uint64_t id : ids) FailRequest(*requests_.at(id), Cancelled("the request was cancelled"));
  CheckFences();
}

void SliceQueue::CheckFences() {
  for (size_t i = 0; i < fences_.size();) {
    if (tickets_.contains(fences_[i].first)) {
      ++i;
      continue;
    }
    TicketDone done = std::move(fences_[i].second);
    fences_.erase(fences_.begin() + static_cast<ptrdiff_t>(i));
    std::move(done)();
  }
}

}  // namespace millrace::transfer
