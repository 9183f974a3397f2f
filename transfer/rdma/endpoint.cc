#include "transfer/rdma/endpoint.h"

#include <fcntl.h>
#include <sys/epoll.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

#include "base/check.h"
#include "base/log.h"
#include "base/random.h"

namespace millrace::transfer::rdma {
namespace {

// A slot costs the initiator at most a request, its data and a release; the target one answer. Probes take
// the rest.
constexpr uint32_t kSendDepth = 3 * kSlots + 8;
// A slot costs the target at most a request and its end, and may be used again before the target has looked.
constexpr uint32_t kReceiveDepth = 4 * kSlots + 8;
// Twice what one life can have outstanding: flushes of the last one may still come while the next begins.
constexpr int kCompletionEntries = 2 * static_cast<int>(kSendDepth + kReceiveDepth);

// The adapter's own retries: 67 ms x (3 + 1). A black hole is found sooner by the slices' own deadlines; this
// bounds the case in which nobody looks. 7 retries would be for ever on some devices. 1 % of loss is
// survived.
constexpr uint8_t kTimeoutExponent = 14;  // 4.096 us x 2^14
constexpr uint8_t kRetries = 3;
// A target that is slow to post receives is waited for: only our own deadlines decide.
constexpr uint8_t kReceiverNotReadyRetries = 7;
constexpr uint8_t kReceiverNotReadyTimer = 12;  // 0.64 ms
constexpr uint8_t kReadsAtOnce = 8;
constexpr uint8_t kHopLimit = 64;
constexpr uint32_t kNumberMask = 0xffffff;

// wr_id: what a completion is about, and in which life of the connection.
enum class Work : uint8_t { kReceive = 1, kFrame = 2, kData = 3 };
constexpr uint64_t WorkId(Work work, uint32_t life, uint32_t what) {
  return static_cast<uint64_t>(work) << 56 | static_cast<uint64_t>(life & kNumberMask) << 32 | what;
}

}  // namespace

StatusOr<std::unique_ptr<Endpoint>> Endpoint::Create(Device* device, EventLoop* loop, uint32_t queue_pairs,
                                                     EndpointEvents events) {
  std::unique_ptr<Endpoint> endpoint(new Endpoint(device, loop, std::move(events)));
  MR_RETURN_IF_ERROR(endpoint->Build(queue_pairs));  // the destructor takes down what was built
  return endpoint;
}

Status Endpoint::Build(uint32_t queue_pairs) {
  const Verbs& verbs = device_->verbs();
  const auto failure = [&](const char* what) {
    return ResourceExhausted("RDMA device {}: cannot make a {}: {}", device_->name(), what,
                             std::strerror(errno));
  };
  channel_ = verbs.create_comp_channel(device_->context());
  if (channel_ == nullptr) return failure("completion channel");
  const int flags = fcntl(channel_->fd, F_GETFL);
  if (flags < 0 || fcntl(channel_->fd, F_SETFL, flags | O_NONBLOCK) != 0)
    return failure("non-blocking channel");
  received_.resize(size_t{queue_pairs} * kReceiveDepth);
  received_mr_ =
      verbs.reg_mr(device_->pd(), received_.data(), received_.size() * kFrameBytes, IBV_ACCESS_LOCAL_WRITE);
  if (received_mr_ == nullptr) return failure("region for messages");
  for (uint32_t i = 0; i < queue_pairs; ++i) {
    Lane& lane = lanes_.emplace_back();
    lane.cq = verbs.create_cq(device_->context(), kCompletionEntries, nullptr, channel_, 0);
    if (lane.cq == nullptr) return failure("completion queue");
    ibv_qp_init_attr attributes{};
    attributes.send_cq = lane.cq;
    attributes.recv_cq = lane.cq;
    attributes.cap.max_send_wr = kSendDepth;
    attributes.cap.max_recv_wr = kReceiveDepth;
    attributes.cap.max_send_sge = 1;
    attributes.cap.max_recv_sge = 1;
    attributes.cap.max_inline_data = kFrameBytes;
    attributes.qp_type = IBV_QPT_RC;
    attributes.sq_sig_all = 1;
    lane.qp = verbs.create_qp(device_->pd(), &attributes);
    if (lane.qp == nullptr) return failure("queue pair");
  }
  loop_->Add(channel_->fd, EPOLLIN, [this](uint32_t) { OnChannel(); });
  watched_ = true;
  return OkStatus();
}

bool Endpoint::Destroy() {
  const Verbs& verbs = device_->verbs();
  ++life_;
  connected_ = false;
  if (watched_) loop_->Remove(channel_->fd);
  watched_ = false;
  int queue_pairs_kept = 0;
  int others_kept = 0;
  for (const Lane& lane : lanes_) {
    if (lane.qp != nullptr) queue_pairs_kept += verbs.destroy_qp(lane.qp) != 0 ? 1 : 0;
  }
  for (const Lane& lane : lanes_) {
    if (lane.cq != nullptr) others_kept += verbs.destroy_cq(lane.cq) != 0 ? 1 : 0;
  }
  lanes_.clear();
  if (received_mr_ != nullptr) others_kept += verbs.dereg_mr(received_mr_) != 0 ? 1 : 0;
  received_mr_ = nullptr;
  if (channel_ != nullptr) others_kept += verbs.destroy_comp_channel(channel_) != 0 ? 1 : 0;
  channel_ = nullptr;
  if (queue_pairs_kept + others_kept > 0) {
    LogError("transfer: RDMA device {}: {} queue pairs and {} other objects of a link were not given back",
             device_->name(), queue_pairs_kept, others_kept);
  }
  return queue_pairs_kept == 0;
}

Status Endpoint::PostReceive(uint32_t lane, uint32_t index) {
  ibv_sge place{};
  place.addr = reinterpret_cast<uint64_t>(&received_[size_t{lane} * kReceiveDepth + index]);
  place.length = kFrameBytes;
  place.lkey = received_mr_->lkey;
  ibv_recv_wr request{};
  request.wr_id = WorkId(Work::kReceive, life_, index);
  request.sg_list = &place;
  request.num_sge = 1;
  ibv_recv_wr* bad = nullptr;
  if (const int error = device_->verbs().post_recv(lanes_[lane].qp, &request, &bad); error != 0)
    return Unavailable("RDMA device {}: cannot post a receive: {}", device_->name(), std::strerror(error));
  return OkStatus();
}

StatusOr<End> Endpoint::Prepare() {
  MR_CHECK(!connected_, "Stop comes before Prepare");
  if (lanes_.empty()) return Unavailable("RDMA device {}: the link's queue pairs are gone", device_->name());
  MR_RETURN_IF_ERROR(device_->Refresh());
  ++life_;
  failed_ = false;
  failure_ = OkStatus();
  Poll();  // what the last life left
  End end;
  end.address = device_->address();
  for (uint32_t i = 0; i < lanes_.size(); ++i) {
    Lane& lane = lanes_[i];
    lane.send_queue_used = 0;
    lane.first_psn = static_cast<uint32_t>(RandomId()) & kNumberMask;
    MR_RETURN_IF_ERROR(ToInit(lane));
    for (uint32_t r = 0; r < kReceiveDepth; ++r) MR_RETURN_IF_ERROR(PostReceive(i, r));
    if (device_->verbs().req_notify_cq(lane.cq, 0) != 0)
      return Unavailable("RDMA device {}: completions cannot be asked for", device_->name());
    end.queue_pairs.push_back({lane.qp->qp_num, lane.first_psn});
  }
  return end;
}

Status Endpoint::ToInit(Lane& lane) {
  const Verbs& verbs = device_->verbs();
  ibv_qp_attr attributes{};
  attributes.qp_state = IBV_QPS_RESET;
  if (const int error = verbs.modify_qp(lane.qp, &attributes, IBV_QP_STATE); error != 0)
    return Unavailable("RDMA device {}: a queue pair cannot be reset: {}", device_->name(),
                       std::strerror(error));
  attributes.qp_state = IBV_QPS_INIT;
  attributes.port_num = device_->port();
  attributes.qp_access_flags = IBV_ACCESS_REMOTE_WRITE | IBV_ACCESS_REMOTE_READ;
  const int mask = IBV_QP_STATE | IBV_QP_PKEY_INDEX | IBV_QP_PORT | IBV_QP_ACCESS_FLAGS;
  if (const int error = verbs.modify_qp(lane.qp, &attributes, mask); error != 0)
    return Unavailable("RDMA device {}: a queue pair cannot be initialised: {}", device_->name(),
                       std::strerror(error));
  return OkStatus();
}

Status Endpoint::Connect(const End& remote) {
  if (remote.queue_pairs.size() != lanes_.size())
    return InvalidArgument("the peer has {} queue pairs for a link of {}", remote.queue_pairs.size(),
                           lanes_.size());
  for (const QueuePairName& name : remote.queue_pairs) {
    if (name.number > kNumberMask || name.first_psn > kNumberMask)
      return InvalidArgument("the peer names queue pair {:#x}, packet {:#x}", name.number, name.first_psn);
  }
  for (size_t i = 0; i < lanes_.size(); ++i)
    MR_RETURN_IF_ERROR(ToReady(lanes_[i], remote.queue_pairs[i], remote.address));
  connected_ = true;
  return OkStatus();
}

Status Endpoint::ToReady(Lane& lane, const QueuePairName& remote, const Address& address) {
  const Verbs& verbs = device_->verbs();
  ibv_qp_attr attributes{};
  attributes.qp_state = IBV_QPS_RTR;
  attributes.path_mtu = std::min(device_->address().mtu, address.mtu);
  attributes.dest_qp_num = remote.number;
  attributes.rq_psn = remote.first_psn;
  attributes.max_dest_rd_atomic = kReadsAtOnce;
  attributes.min_rnr_timer = kReceiverNotReadyTimer;
  attributes.ah_attr.is_global = 1;
  std::copy(address.gid.begin(), address.gid.end(), attributes.ah_attr.grh.dgid.raw);
  attributes.ah_attr.grh.sgid_index = device_->gid_index();
  attributes.ah_attr.grh.hop_limit = kHopLimit;
  attributes.ah_attr.dlid = address.lid;
  attributes.ah_attr.port_num = device_->port();
  int mask = IBV_QP_STATE | IBV_QP_AV | IBV_QP_PATH_MTU | IBV_QP_DEST_QPN | IBV_QP_RQ_PSN |
             IBV_QP_MAX_DEST_RD_ATOMIC | IBV_QP_MIN_RNR_TIMER;
  if (const int error = verbs.modify_qp(lane.qp, &attributes, mask); error != 0) {
    return Unavailable("RDMA device {}: no way from {} to {}: {}", device_->name(),
                       GidText(device_->address().gid), GidText(address.gid), std::strerror(error));
  }
  attributes.qp_state = IBV_QPS_RTS;
  attributes.sq_psn = lane.first_psn;
  attributes.timeout = kTimeoutExponent;
  attributes.retry_cnt = kRetries;
  attributes.rnr_retry = kReceiverNotReadyRetries;
  attributes.max_rd_atomic = kReadsAtOnce;
  mask = IBV_QP_STATE | IBV_QP_SQ_PSN | IBV_QP_TIMEOUT | IBV_QP_RETRY_CNT | IBV_QP_RNR_RETRY |
         IBV_QP_MAX_QP_RD_ATOMIC;
  if (const int error = verbs.modify_qp(lane.qp, &attributes, mask); error != 0)
    return Unavailable("RDMA device {}: a queue pair cannot send: {}", device_->name(), std::strerror(error));
  return OkStatus();
}

bool Endpoint::Stop() {
  const Verbs& verbs = device_->verbs();
  ibv_qp_attr attributes{};
  attributes.qp_state = IBV_QPS_ERR;
  for (const Lane& lane : lanes_) (void)verbs.modify_qp(lane.qp, &attributes, IBV_QP_STATE);
  failed_ = true;  // what is flushed from here on is no news
  failure_ = OkStatus();
  Poll();
  connected_ = false;
  bool obeyed = true;
  attributes.qp_state = IBV_QPS_RESET;
  for (Lane& lane : lanes_) {
    if (verbs.modify_qp(lane.qp, &attributes, IBV_QP_STATE) == 0) continue;
    LogError("transfer: RDMA device {}: a queue pair cannot be reset", device_->name());
    obeyed = false;
  }
  ++life_;  // what an earlier life left in the completion queues is not told
  return obeyed;
}

Status Endpoint::Posted(int error, Lane& lane, const char* what) {
  if (error == 0) {
    ++lane.send_queue_used;
    return OkStatus();
  }
  if (error == ENOMEM) return ResourceExhausted("the send queue is full");
  const Status status =
      Unavailable("RDMA device {}: cannot post a {}: {}", device_->name(), what, std::strerror(error));
  Fail(status);
  return status;
}

Status Endpoint::SendFrame(uint32_t queue_pair, const Frame& frame) {
  Lane& lane = lanes_.at(queue_pair);
  if (lane.send_queue_used == kSendDepth) return ResourceExhausted("the send queue is full");
  FrameBytes bytes = Encode(frame);
  ibv_sge place{};
  place.addr = reinterpret_cast<uint64_t>(bytes.data());
  place.length = kFrameBytes;
  ibv_send_wr request{};
  request.wr_id = WorkId(Work::kFrame, life_, frame.slot);
  request.sg_list = &place;
  request.num_sge = 1;
  request.opcode = IBV_WR_SEND;
  request.send_flags = IBV_SEND_INLINE | IBV_SEND_SIGNALED;
  ibv_send_wr* bad = nullptr;
  return Posted(device_->verbs().post_send(lane.qp, &request, &bad), lane, "message");
}

Status Endpoint::SendData(uint32_t queue_pair, const Data& data) {
  Lane& lane = lanes_.at(queue_pair);
  if (lane.send_queue_used == kSendDepth) return ResourceExhausted("the send queue is full");
  ibv_sge place{};
  place.addr = reinterpret_cast<uint64_t>(data.local);
  place.length = data.length;
  place.lkey = data.local_key;
  ibv_send_wr request{};
  request.wr_id = WorkId(Work::kData, life_, data.slot);
  request.sg_list = &place;
  request.num_sge = 1;
  request.opcode = data.read ? IBV_WR_RDMA_READ : IBV_WR_RDMA_WRITE_WITH_IMM;
  request.send_flags = IBV_SEND_SIGNALED;
  request.imm_data = htobe32(data.slot);
  request.wr.rdma.remote_addr = data.remote;
  request.wr.rdma.rkey = data.remote_key;
  ibv_send_wr* bad = nullptr;
  return Posted(device_->verbs().post_send(lane.qp, &request, &bad), lane, data.read ? "read" : "write");
}

void Endpoint::OnChannel() {
  const Verbs& verbs = device_->verbs();
  ibv_cq* cq = nullptr;
  void* context = nullptr;
  while (verbs.get_cq_event(channel_, &cq, &context) == 0) verbs.ack_cq_events(cq, 1);
  // Asked for again before the queues are emptied, so that what comes in between wakes the loop once more.
  for (const Lane& lane : lanes_) (void)verbs.req_notify_cq(lane.cq, 0);
  Poll();
}

void Endpoint::Poll() {
  const uint32_t life = life_;
  ++polling_;
  for (uint32_t i = 0; i < lanes_.size() && life == life_; ++i) {
    // A callback may have stopped this life: what is left belongs to none.
    while (life == life_ && (!lanes_[i].seen.empty() || Take(lanes_[i]))) {
      const ibv_wc completion = lanes_[i].seen.front();
      lanes_[i].seen.pop_front();
      OnCompletion(i, completion);
    }
  }
  --polling_;
  TellFailure();
}

// Moves what the completion queue holds, up to a batch. False: nothing.
bool Endpoint::Take(Lane& lane) {
  ibv_wc completions[16];
  const int count = device_->verbs().poll_cq(lane.cq, 16, completions);
  if (count < 0) Fail(Unavailable("RDMA device {}: a completion queue is broken", device_->name()));
  for (int i = 0; i < count; ++i) lane.seen.push_back(completions[i]);
  return count > 0;
}

bool Endpoint::HasImmediate(uint32_t queue_pair, uint32_t immediate) {
  Lane& lane = lanes_.at(queue_pair);
  while (Take(lane)) {
  }
  return std::any_of(lane.seen.begin(), lane.seen.end(), [&](const ibv_wc& completion) {
    return (completion.wr_id >> 32 & kNumberMask) == (life_ & kNumberMask) &&
           completion.status == IBV_WC_SUCCESS && completion.opcode == IBV_WC_RECV_RDMA_WITH_IMM &&
           be32toh(completion.imm_data) == immediate;
  });
}

void Endpoint::OnCompletion(uint32_t index, const ibv_wc& completion) {
  if ((completion.wr_id >> 32 & kNumberMask) != (life_ & kNumberMask)) return;
  const auto work = static_cast<Work>(completion.wr_id >> 56);
  const auto what = static_cast<uint32_t>(completion.wr_id);
  Lane& lane = lanes_[index];
  if (work != Work::kReceive) --lane.send_queue_used;
  if (completion.status != IBV_WC_SUCCESS) {
    return Fail(Unavailable("RDMA device {}: {} (vendor code {:#x})", device_->name(),
                            device_->verbs().wc_status_str(completion.status), completion.vendor_err));
  }
  if (work == Work::kData) return events_.data_done(index, what);
  if (work != Work::kReceive) return;

  const bool immediate = completion.opcode == IBV_WC_RECV_RDMA_WITH_IMM;
  StatusOr<Frame> frame = Frame{};
  if (!immediate)
    frame = Decode(std::span<const std::byte>(received_[size_t{index} * kReceiveDepth + what])
                       .first(std::min<size_t>(completion.byte_len, kFrameBytes)));
  if (!failed_) {
    if (const Status status = PostReceive(index, what); !status.ok()) return Fail(status);
  }
  if (!frame.ok()) return Fail(frame.status());
  if (immediate) return events_.immediate(index, be32toh(completion.imm_data));
  events_.frame(index, *frame);
}

void Endpoint::Fail(const Status& status) {
  if (failed_) return;
  failed_ = true;
  failure_ = status;
  if (polling_ > 0) return;  // told at the end of the round
  // Told on a stack of its own: the caller is in the middle of something.
  loop_->Post([self = std::weak_ptr<Endpoint*>(self_)] {
    if (const auto endpoint = self.lock()) (*endpoint)->TellFailure();
  });
}

void Endpoint::TellFailure() {
  if (polling_ > 0 || failure_.ok()) return;
  events_.failed(std::exchange(failure_, OkStatus()));
}

bool Endpoint::Owns(const ibv_qp* qp) const {
  return std::any_of(lanes_.begin(), lanes_.end(), [qp](const Lane& lane) { return lane.qp == qp; });
}

bool Endpoint::Owns(const ibv_cq* cq) const {
  return std::any_of(lanes_.begin(), lanes_.end(), [cq](const Lane& lane) { return lane.cq == cq; });
}

}  // namespace millrace::transfer::rdma
