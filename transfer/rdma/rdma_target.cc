#include "transfer/rdma/rdma_target.h"

#include "base/check.h"
#include "base/log.h"
#include "transfer/rdma/rdma_path.h"

namespace millrace::transfer::rdma {
namespace {

constexpr uint32_t kQueuePairsMax = 16;  // whatever the initiator wants
// The bound of CloseTicket on this rail: leases that are not given back by then end with the link. The rest
// of the queue pairs, not the time, is what proves that nothing lands any more.
constexpr Duration kClosingStall = std::chrono::milliseconds(200);

}  // namespace

RdmaTarget::RdmaTarget(const Environment& environment, Device* device, size_t device_index,
                       uint64_t peer_epoch, uint64_t link)
    : env_(environment),
      device_(device),
      device_index_(device_index),
      peer_epoch_(peer_epoch),
      link_(link),
      last_heard_(env_.clock->Now()) {
  env_.landing->Join(peer_epoch_);
}

RdmaTarget::~RdmaTarget() {
  Rest();
  env_.landing->Leave(peer_epoch_);
}

void RdmaTarget::Refuse(const v1::Connect& connect, ControlChannel* channel, const std::string& why) {
  v1::Message message;
  v1::Accept* const accept = message.mutable_accept();
  accept->set_link(connect.link());
  accept->set_generation(connect.generation());
  accept->set_refusal(why);
  (void)channel->SendMessage("rdma", message.SerializeAsString());
}

void RdmaTarget::OnConnect(const v1::Connect& connect, ControlChannel* channel) {
  if (connect.generation() <= generation_) return;  // overtaken by a later one
  Rest();
  generation_ = connect.generation();
  channel_ = channel;
  last_heard_ = env_.clock->Now();
  const auto make = [&]() -> StatusOr<End> {
    MR_RETURN_IF_ERROR(env_.regions->Usable(device_index_));
    MR_ASSIGN_OR_RETURN(const End remote, ParseEnd(connect.end()));
    const size_t queue_pairs = remote.queue_pairs.size();
    if (queue_pairs < 1 || queue_pairs > kQueuePairsMax)
      return InvalidArgument("a link of {} queue pairs", queue_pairs);
    if (endpoint_ != nullptr && endpoint_->num_queue_pairs() != queue_pairs)
      return InvalidArgument("a link that changes its queue pairs from {} to {}",
                             endpoint_->num_queue_pairs(), queue_pairs);
    if (endpoint_ == nullptr) {
      EndpointEvents events;
      events.frame = [this](uint32_t queue_pair, const Frame& frame) { OnFrame(queue_pair, frame); };
      events.immediate = [this](uint32_t queue_pair, uint32_t slot) { OnEnd(queue_pair, slot, true); };
      events.data_done = [](uint32_t, uint32_t) {};  // a target moves no data
      events.failed = [this](const Status& why) { Break(why); };
      MR_ASSIGN_OR_RETURN(endpoint_, Endpoint::Create(device_, env_.loop, static_cast<uint32_t>(queue_pairs),
                                                      std::move(events)));
      leases_.assign(queue_pairs, std::vector<Lease>(kSlots));
      for (uint32_t lane = 0; lane < leases_.size(); ++lane) {
        for (uint32_t slot = 0; slot < kSlots; ++slot) {
          leases_[lane][slot].target = this;
          leases_[lane][slot].queue_pair = lane;
          leases_[lane][slot].slot = slot;
        }
      }
    }
    MR_ASSIGN_OR_RETURN(const End end, endpoint_->Prepare());
    MR_RETURN_IF_ERROR(endpoint_->Connect(remote));
    return end;
  };
  const StatusOr<End> end = make();
  if (!end.ok()) return Refuse(connect, channel, std::string(Message(end.status())));
  up_ = true;
  v1::Message message;
  v1::Accept* const accept = message.mutable_accept();
  accept->set_link(link_);
  accept->set_generation(generation_);
  FillEnd(*end, accept->mutable_end());
  (void)channel->SendMessage("rdma", message.SerializeAsString());  // if it is lost, the initiator asks again
}

void RdmaTarget::OnPeerBroke(const v1::Broken& broken) {
  if (broken.generation() == generation_) Rest();
}

void RdmaTarget::ForgetChannel(const ControlChannel* channel) {
  if (channel_ == channel) channel_ = nullptr;
}

void RdmaTarget::Break(const Status& why) {
  if (!up_) return;
  Rest();
  if (channel_ == nullptr) return;  // the initiator's own deadlines find out
  v1::Message message;
  v1::Broken* const broken = message.mutable_broken();
  broken->set_link(link_);
  broken->set_generation(generation_);
  broken->set_reason(std::string(millrace::Message(why)));
  (void)channel_->SendMessage("rdma", message.SerializeAsString());
}

void RdmaTarget::Rest() {
  up_ = false;
  unsent_.clear();
  closing_since_ = kNoDeadline;
  if (endpoint_ == nullptr) return;
  bool at_rest = endpoint_->Stop();  // still takes in ends of leases that had arrived
  if (!at_rest) {
    at_rest = endpoint_->Destroy();
    env_.loop->Post([dead = std::move(endpoint_)] {});  // it may be the caller's caller
    endpoint_ = nullptr;
  }
  if (!at_rest) {
    LogError("transfer: RDMA device {} keeps {} slices' memory: their tickets stay in quarantine",
             device_->name(), num_leases_);
    return;
  }
  for (auto& lane : leases_) {
    for (Lease& lease : lane) {
      if (lease.active) GiveBack(&lease);
    }
  }
}

void RdmaTarget::GiveBack(Lease* lease) {
  lease->active = false;
  --num_leases_;
  if (std::exchange(lease->superseded, false)) return;
  if (!lease->read) env_.landing->End(peer_epoch_, lease->slice);
  env_.memory->Unpin(lease->ticket);
}

// An initiator learns that its write has landed from its own adapter, often before this process has looked
// into the completion queue: what it does next on another link must not cost this one. Otherwise one slot
// cannot be taken back alone: the whole link goes to rest, and the initiator makes it anew.
void RdmaTarget::Supersede(Lease* lease) {
  const TicketId ticket = lease->ticket;
  if (endpoint_ != nullptr && endpoint_->HasImmediate(lease->queue_pair, lease->slot)) {
    lease->superseded = true;
    env_.counters->bytes_received += lease->length;
    env_.memory->Unpin(ticket);
    return;
  }
  lease->active = false;
  --num_leases_;
  Break(Aborted("a later copy of a slice in flight came on another path"));
  env_.memory->Unpin(ticket);
}

void RdmaTarget::OnFrame(uint32_t queue_pair, const Frame& frame) {
  if (!up_) return;  // going to rest
  last_heard_ = env_.clock->Now();
  switch (frame.kind) {
    case FrameKind::kRequest:
      return OnRequest(queue_pair, frame);
    case FrameKind::kRelease:
      return OnEnd(queue_pair, frame.slot, false);
    case FrameKind::kProbe: {
      Frame answer;
      answer.kind = FrameKind::kProbeAnswer;
      answer.number = frame.number;
      return SendAnswer(queue_pair, answer);
    }
    case FrameKind::kAnswer:
    case FrameKind::kProbeAnswer:
      return endpoint_->Fail(DataLoss("an unexpected message of the initiator"));
  }
}

void RdmaTarget::OnRequest(uint32_t queue_pair, const Frame& frame) {
  Lease& lease = leases_[queue_pair][frame.slot];
  if (lease.active) return endpoint_->Fail(DataLoss("slot {} is in use", frame.slot));
  Frame answer;
  answer.kind = FrameKind::kAnswer;
  answer.slot = frame.slot;
  answer.verdict = Verdict::kRefused;
  const Operation operation = frame.read ? Operation::kRead : Operation::kWrite;
  const auto place =
      env_.memory->Admit(peer_epoch_, frame.ticket, operation, frame.region, frame.offset, frame.length);
  if (!place.ok()) {
    ++env_.counters->slices_refused;
    return SendAnswer(queue_pair, answer);
  }
  const auto keys = env_.regions->Find(device_index_, frame.region);
  if (!keys.ok()) {
    env_.memory->Unpin(frame.ticket);
    return endpoint_->Fail(keys.status());
  }
  // Copies of a write must land in order. A read lands at the initiator, who knows its own copies.
  if (!frame.read) {
    const uint32_t generation = generation_;
    const bool first =
        env_.landing->Begin(peer_epoch_, frame.slice, frame.attempt, frame.retired_below, &lease);
    // An earlier copy may have been on this very link: then it has been put to rest meanwhile.
    const bool over = !up_ || generation != generation_;
    if (!first || over) {
      if (first) env_.landing->End(peer_epoch_, frame.slice);
      env_.memory->Unpin(frame.ticket);
      answer.verdict = Verdict::kSuperseded;
      if (!over) SendAnswer(queue_pair, answer);
      return;
    }
  }
  lease.active = true;
  lease.read = frame.read;
  lease.ticket = frame.ticket;
  lease.slice = frame.slice;
  lease.length = frame.length;
  ++num_leases_;
  answer.verdict = Verdict::kGranted;
  answer.address = reinterpret_cast<uint64_t>(*place);
  answer.key = keys->remote;
  SendAnswer(queue_pair, answer);
}

void RdmaTarget::OnEnd(uint32_t queue_pair, uint32_t slot, bool by_write) {
  last_heard_ = env_.clock->Now();
  if (slot >= kSlots || !leases_[queue_pair][slot].active || leases_[queue_pair][slot].read == by_write)
    return endpoint_->Fail(DataLoss("the end of no slice: slot {}", slot));
  Lease& lease = leases_[queue_pair][slot];
  if (by_write && !lease.superseded) env_.counters->bytes_received += lease.length;
  GiveBack(&lease);
}

void RdmaTarget::SendAnswer(uint32_t queue_pair, const Frame& frame) {
  std::vector<Answer> waiting = std::exchange(unsent_, {});
  waiting.push_back({queue_pair, frame});
  for (Answer& answer : waiting) {
    const Status status = unsent_.empty() ? endpoint_->SendFrame(answer.queue_pair, answer.frame)
                                          : ResourceExhausted("in order");
    if (status.code() == absl::StatusCode::kResourceExhausted) unsent_.push_back(answer);
  }
}

void RdmaTarget::OnTicketClosing(TicketId ticket, TimePoint now) {
  for (const auto& lane : leases_) {
    for (const Lease& lease : lane) {
      if (lease.active && !lease.superseded && lease.ticket == ticket)
        closing_since_ = std::min(closing_since_, now);
    }
  }
}

TimePoint RdmaTarget::Tick(TimePoint now) {
  if (!unsent_.empty()) {
    const Answer last = unsent_.back();
    unsent_.pop_back();
    SendAnswer(last.queue_pair, last.frame);
  }
  TimePoint next = unsent_.empty() ? kNoDeadline : now + std::chrono::milliseconds(1);
  if (closing_since_ == kNoDeadline) return next;
  bool stuck = false;
  for (const auto& lane : leases_) {
    for (const Lease& lease : lane)
      stuck = stuck || (lease.active && !lease.superseded && env_.memory->IsClosing(lease.ticket));
  }
  if (!stuck) {
    closing_since_ = kNoDeadline;
    return next;
  }
  if (now >= closing_since_ + kClosingStall) {
    LogWarning("transfer: a peer holds on to memory of a closed ticket: its link over {} is ended",
               device_->name());
    Break(DeadlineExceeded("slices of a closed ticket were not finished"));
    return kNoDeadline;
  }
  return std::min(next, closing_since_ + kClosingStall);
}

bool RdmaTarget::Abandoned(TimePoint now, Duration patience) const {
  return channel_ == nullptr && now - last_heard_ > patience;
}

}  // namespace millrace::transfer::rdma
