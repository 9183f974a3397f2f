#include "transfer/rdma/rdma_path.h"

#include <algorithm>

#include "base/check.h"
#include "base/log.h"

namespace millrace::transfer::rdma {

void FillEnd(const End& end, v1::End* message) {
  message->set_gid(end.address.gid.data(), end.address.gid.size());
  message->set_lid(end.address.lid);
  message->set_mtu(end.address.mtu);
  for (const QueuePairName& name : end.queue_pairs) {
    v1::QueuePair* const pair = message->add_queue_pairs();
    pair->set_number(name.number);
    pair->set_first_psn(name.first_psn);
  }
}

StatusOr<End> ParseEnd(const v1::End& message) {
  End end;
  if (message.gid().size() != end.address.gid.size())
    return InvalidArgument("a GID of {} bytes", message.gid().size());
  if (message.lid() > UINT16_MAX) return InvalidArgument("LID {}", message.lid());
  if (message.mtu() < IBV_MTU_256 || message.mtu() > IBV_MTU_4096)
    return InvalidArgument("MTU {}", message.mtu());
  std::copy(message.gid().begin(), message.gid().end(), end.address.gid.begin());
  end.address.lid = static_cast<uint16_t>(message.lid());
  end.address.mtu = static_cast<ibv_mtu>(message.mtu());
  for (const v1::QueuePair& pair : message.queue_pairs())
    end.queue_pairs.push_back({pair.number(), pair.first_psn()});
  return end;
}

RdmaPath::RdmaPath(EventLoop* loop, Device* device, size_t device_index, const Regions* regions,
                   ControlChannel* control, Target target, std::function<void()> forget)
    : loop_(loop),
      device_(device),
      device_index_(device_index),
      regions_(regions),
      control_(control),
      target_(std::move(target)),
      forget_(std::move(forget)),
      slots_(kQueuePairs, std::vector<Slot>(kSlots)),
      free_(kQueuePairs) {
  traits_.kind = "rdma";
  traits_.local_rail = device_->name();
  traits_.remote_rail = target_.text;
  traits_.slices_in_flight_max = kQueuePairs * kSlots;
  traits_.overtakes = false;
  for (auto& slots : free_) {
    for (uint32_t slot = 0; slot < kSlots; ++slot) slots.push_back(slot);
  }
}

RdmaPath::~RdmaPath() {
  owner_ = nullptr;
  Rest();
  forget_();
}

void RdmaPath::Connect() {
  MR_CHECK(state_ == State::kIdle);
  const auto make = [this]() -> StatusOr<End> {
    MR_RETURN_IF_ERROR(regions_->Usable(device_index_));
    if (endpoint_ == nullptr) {
      EndpointEvents events;
      events.frame = [this](uint32_t queue_pair, const Frame& frame) { OnFrame(queue_pair, frame); };
      events.immediate = [this](uint32_t, uint32_t) {
        endpoint_->Fail(DataLoss("the target wrote to the initiator"));
      };
      events.data_done = [this](uint32_t queue_pair, uint32_t slot) { OnDataDone(queue_pair, slot); };
      events.failed = [this](const Status& why) { Break(why); };
      MR_ASSIGN_OR_RETURN(endpoint_, Endpoint::Create(device_, loop_, kQueuePairs, std::move(events)));
    }
    return endpoint_->Prepare();
  };
  const StatusOr<End> end = make();
  if (!end.ok()) return owner_->OnBroken(this, end.status());
  v1::Message message;
  v1::Connect* const connect = message.mutable_connect();
  connect->set_link(target_.link);
  connect->set_generation(++generation_);
  connect->set_rail(target_.rail);
  FillEnd(*end, connect->mutable_end());
  state_ = State::kAsked;
  peer_knows_ = false;
  if (control_ == nullptr || !control_->SendMessage("rdma", message.SerializeAsString())) {
    state_ = State::kIdle;
    owner_->OnBroken(this, Unavailable("no control session to ask the peer over"));
  }
}

void RdmaPath::OnAccept(const v1::Accept& accept) {
  if (state_ != State::kAsked || accept.generation() != generation_)
    return;  // of an attempt that was given up
  const auto connect = [&]() -> Status {
    if (!accept.refusal().empty()) return Unavailable("the peer made no link: {}", accept.refusal());
    MR_ASSIGN_OR_RETURN(const End remote, ParseEnd(accept.end()));
    return endpoint_->Connect(remote);
  };
  if (const Status status = connect(); !status.ok()) return Break(status);
  state_ = State::kUp;
  owner_->OnConnected(this);
}

void RdmaPath::OnPeerBroke(const v1::Broken& broken) {
  if (broken.generation() != generation_) return;
  peer_knows_ = true;
  Break(Unavailable("the peer ended the link: {}", broken.reason()));
}

void RdmaPath::TellPeer(const std::string& reason) {
  if (std::exchange(peer_knows_, true)) return;
  v1::Message message;
  v1::Broken* const broken = message.mutable_broken();
  broken->set_link(target_.link);
  broken->set_generation(generation_);
  broken->set_from_initiator(true);
  broken->set_reason(reason);
  // If this is lost, the next Connect says the same, and a closing ticket has its own bound.
  if (control_ != nullptr) (void)control_->SendMessage("rdma", message.SerializeAsString());
}

void RdmaPath::Break(const Status& why) {
  if (state_ == State::kIdle) return;
  owner_->OnBroken(this, why);  // disconnects
  Disconnect();
}

void RdmaPath::Disconnect() {
  if (state_ == State::kIdle) return;
  TellPeer("given up by the initiator");
  Rest();
}

void RdmaPath::Rest() {
  if (endpoint_ == nullptr) {
    state_ = State::kIdle;
    return;
  }
  bool at_rest = endpoint_->Stop();  // still reports what had completed
  state_ = State::kIdle;
  // Soft-RoCE (Linux 6.1) remembers a half-arrived READ over RESET and then fails every later life of the
  // queue pair: it is made anew.
  const bool spoilt = std::any_of(slots_.begin(), slots_.end(), [](const auto& slots) {
    return std::any_of(slots.begin(), slots.end(), [](const Slot& slot) {
      return slot.step == Step::kMoving && slot.slice.operation == Operation::kRead;
    });
  });
  if (!at_rest || spoilt) {
    at_rest = endpoint_->Destroy() || at_rest;
    // It may be the caller's caller: gone at the loop's next round.
    loop_->Post([dead = std::move(endpoint_)] {});
    endpoint_ = nullptr;
  }
  deferred_.clear();
  probe_ = 0;
  if (!at_rest) {
    LogError("transfer: RDMA device {} keeps memory: slices in flight to {} never end", device_->name(),
             target_.text);
    return;
  }
  for (uint32_t queue_pair = 0; queue_pair < kQueuePairs; ++queue_pair) {
    for (uint32_t slot = 0; slot < kSlots; ++slot) {
      if (slots_[queue_pair][slot].step != Step::kFree) Finish(queue_pair, slot, SliceOutcome::kUnknown);
    }
  }
}

void RdmaPath::Send(const Slice& slice) {
  MR_CHECK(state_ == State::kUp);
  for (uint32_t i = 0; i < kQueuePairs && free_[next_queue_pair_].empty(); ++i)
    next_queue_pair_ = (next_queue_pair_ + 1) % kQueuePairs;
  const uint32_t queue_pair = next_queue_pair_;
  next_queue_pair_ = (next_queue_pair_ + 1) % kQueuePairs;
  MR_CHECK(!free_[queue_pair].empty(), "more slices in flight than the path holds");
  const uint32_t slot = free_[queue_pair].back();
  free_[queue_pair].pop_back();
  slots_[queue_pair][slot] = {Step::kAsked, slice};
  Deferred work;
  work.queue_pair = queue_pair;
  work.frame.kind = FrameKind::kRequest;
  work.frame.slot = slot;
  work.frame.read = slice.operation == Operation::kRead;
  work.frame.ticket = slice.ticket;
  work.frame.region = slice.remote_region;
  work.frame.offset = slice.remote_offset;
  work.frame.length = static_cast<uint32_t>(slice.local.size());
  work.frame.slice = slice.id;
  work.frame.attempt = slice.attempt;
  work.frame.retired_below = slice.retired_below;
  Post(work);
}

void RdmaPath::Post(const Deferred& work) {
  if (deferred_.empty()) {
    const Status status = work.data ? endpoint_->SendData(work.queue_pair, work.move)
                                    : endpoint_->SendFrame(work.queue_pair, work.frame);
    if (status.code() != absl::StatusCode::kResourceExhausted) return;  // posted, or the link is breaking
  }
  deferred_.push_back(work);
}

bool RdmaPath::PostDeferred() {
  while (!deferred_.empty()) {
    const Deferred& work = deferred_.front();
    const Status status = work.data ? endpoint_->SendData(work.queue_pair, work.move)
                                    : endpoint_->SendFrame(work.queue_pair, work.frame);
    if (status.code() == absl::StatusCode::kResourceExhausted) return false;
    deferred_.pop_front();
  }
  return true;
}

void RdmaPath::OnFrame(uint32_t queue_pair, const Frame& frame) {
  if (frame.kind == FrameKind::kAnswer) return OnAnswer(queue_pair, frame);
  if (frame.kind != FrameKind::kProbeAnswer)
    return endpoint_->Fail(DataLoss("an unexpected message of the target"));
  if (owner_ == nullptr || frame.number != probe_ || probe_ == 0 || ++probe_answers_ < kQueuePairs) return;
  owner_->OnProbeDone(this, std::exchange(probe_, 0));
}

void RdmaPath::OnAnswer(uint32_t queue_pair, const Frame& frame) {
  Slot& slot = slots_[queue_pair][frame.slot];
  if (slot.step != Step::kAsked) return endpoint_->Fail(DataLoss("an answer to no question"));
  if (frame.verdict != Verdict::kGranted) {
    return Finish(queue_pair, frame.slot,
                  frame.verdict == Verdict::kRefused ? SliceOutcome::kRefused : SliceOutcome::kUnknown);
  }
  const auto keys = regions_->Find(device_index_, slot.slice.local_region);
  if (!keys.ok()) return endpoint_->Fail(keys.status());
  slot.step = Step::kMoving;
  Deferred work;
  work.queue_pair = queue_pair;
  work.data = true;
  work.move.read = slot.slice.operation == Operation::kRead;
  work.move.local = slot.slice.local.data();
  work.move.local_key = keys->local;
  work.move.length = static_cast<uint32_t>(slot.slice.local.size());
  work.move.remote = frame.address;
  work.move.remote_key = frame.key;
  work.move.slot = frame.slot;
  Post(work);
}

void RdmaPath::OnDataDone(uint32_t queue_pair, uint32_t slot) {
  MR_CHECK(slots_[queue_pair][slot].step == Step::kMoving);
  // A write's immediate data was the release.
  if (slots_[queue_pair][slot].slice.operation == Operation::kRead) {
    Deferred work;
    work.queue_pair = queue_pair;
    work.frame.kind = FrameKind::kRelease;
    work.frame.slot = slot;
    Post(work);
  }
  (void)PostDeferred();
  Finish(queue_pair, slot, SliceOutcome::kLanded);
}

void RdmaPath::Finish(uint32_t queue_pair, uint32_t index, SliceOutcome outcome) {
  Slot& slot = slots_[queue_pair][index];
  const uint64_t slice = slot.slice.id;
  slot.step = Step::kFree;
  free_[queue_pair].push_back(index);
  if (owner_ != nullptr) owner_->OnSliceDone(this, slice, outcome);
}

void RdmaPath::Probe(uint64_t probe) {
  MR_CHECK(state_ == State::kUp);
  probe_ = probe;
  probe_answers_ = 0;
  for (uint32_t queue_pair = 0; queue_pair < kQueuePairs; ++queue_pair) {
    Deferred work;
    work.queue_pair = queue_pair;
    work.frame.kind = FrameKind::kProbe;
    work.frame.number = probe;
    Post(work);
  }
}

}  // namespace millrace::transfer::rdma
