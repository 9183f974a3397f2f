#include "fake_verbs.h"

#include <sys/eventfd.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

#include "base/check.h"

namespace millrace::transfer::rdma {
namespace {

FakeFabric* fabric = nullptr;

int MakeEventFd() { return eventfd(0, EFD_CLOEXEC | EFD_SEMAPHORE); }
void Signal(int fd) {
  const uint64_t one = 1;
  MR_CHECK(write(fd, &one, sizeof(one)) == sizeof(one));
}
bool Wait(int fd) {  // takes one; false when there is none and the descriptor does not block
  uint64_t one = 0;
  return read(fd, &one, sizeof(one)) == sizeof(one);
}

}  // namespace

struct FakeFabric::Packet {
  uint32_t from = 0;  // queue pair numbers
  uint32_t to = 0;
  uint32_t to_psn = 0;  // of the life that it is meant for
  uint32_t from_life = 0;
  uint64_t wr_id = 0;
  ibv_wr_opcode opcode = IBV_WR_SEND;
  uint32_t immediate = 0;
  std::vector<std::byte> payload;  // as it was when posted
  std::byte* local = nullptr;      // READ
  uint32_t length = 0;
  uint64_t remote = 0;
  uint32_t key = 0;
  bool completed = false;  // its sender has been told already
};
struct FakeFabric::Device : ibv_device {
  std::string text;
  std::array<uint8_t, 16> gid{};
  bool up = true;
  Wire wire = Wire::kGood;
  bool hold_completions = false;
  std::vector<std::pair<Qp*, ibv_wc>> held;
  ibv_wc_status next_data = IBV_WC_SUCCESS;
  uint64_t bytes_written = 0;
  std::vector<Context*> contexts;
};
struct FakeFabric::Context : ibv_context {
  Device* owner = nullptr;
  std::deque<ibv_async_event> events;
  int children = 0;
};
struct FakeFabric::Pd : ibv_pd {
  int children = 0;
};
struct FakeFabric::Mr : ibv_mr {
  int access = 0;
};
struct FakeFabric::Channel : ibv_comp_channel {
  std::deque<Cq*> ready;
};
struct FakeFabric::Cq : ibv_cq {
  std::deque<ibv_wc> completions;
  size_t capacity = 0;
  bool armed = false;
  int users = 0;
};
struct FakeFabric::Qp : ibv_qp {
  Device* owner = nullptr;
  ibv_qp_cap cap{};
  uint32_t life = 0;
  uint32_t psn = 0;  // expected from the peer
  uint32_t remote = 0;
  uint32_t remote_psn = 0;
  std::array<uint8_t, 16> remote_gid{};
  std::deque<std::pair<uint64_t, ibv_sge>> receives;
  std::deque<Packet> waiting;  // for a receive to be posted
  std::deque<uint64_t> unacknowledged;
};

struct FakeCalls {
  using F = FakeFabric;
  static std::unique_lock<std::mutex> Lock() { return std::unique_lock(fabric->mutex_); }
  template <typename T>
  static T* Made(T* object, const char* what) {
    fabric->objects_.emplace(object, [object] { delete object; });
    ++fabric->made_[what];
    return object;
  }
  template <typename T>
  static int Gone(T* object, const char* what) {
    MR_CHECK(fabric->objects_.erase(object) == 1, "a {} that is not there is given back", what);
    --fabric->made_[what];
    delete object;
    return 0;
  }

  static ibv_device** GetDeviceList(int* count) {
    const auto lock = Lock();
    if (fabric->Fails("get_device_list")) return nullptr;
    *count = static_cast<int>(fabric->devices_.size());
    auto** list = new ibv_device*[fabric->devices_.size() + 1]();
    for (size_t i = 0; i < fabric->devices_.size(); ++i) list[i] = fabric->devices_[i].get();
    ++fabric->made_["device list"];
    return list;
  }
  static void FreeDeviceList(ibv_device** list) {
    const auto lock = Lock();
    --fabric->made_["device list"];
    delete[] list;
  }
  static const char* GetDeviceName(ibv_device* device) {
    return static_cast<F::Device*>(device)->text.c_str();
  }
  static ibv_context* OpenDevice(ibv_device* device) {
    const auto lock = Lock();
    if (fabric->Fails("open_device")) return nullptr;
    auto* context = Made(new F::Context(), "context");
    context->owner = static_cast<F::Device*>(device);
    context->device = device;
    context->async_fd = MakeEventFd();
    context->owner->contexts.push_back(context);
    return context;
  }
  static int CloseDevice(ibv_context* context) {
    const auto lock = Lock();
    auto* mine = static_cast<F::Context*>(context);
    if (mine->children > 0) return EBUSY;
    std::erase(mine->owner->contexts, mine);
    close(mine->async_fd);
    return Gone(mine, "context");
  }
  static int QueryDevice(ibv_context*, ibv_device_attr* attributes) {
    const auto lock = Lock();
    if (fabric->Fails("query_device")) return errno;
    *attributes = {};
    attributes->phys_port_cnt = 1;
    return 0;
  }
  static int QueryPort(ibv_context* context, uint8_t, ibv_port_attr* attributes) {
    const auto lock = Lock();
    *attributes = {};
    attributes->state = static_cast<F::Context*>(context)->owner->up ? IBV_PORT_ACTIVE : IBV_PORT_DOWN;
    attributes->active_mtu = IBV_MTU_4096;
    return 0;
  }
  static ssize_t QueryGidTable(ibv_context* context, ibv_gid_entry* entries, size_t) {
    const auto lock = Lock();
    const auto& gid = static_cast<F::Context*>(context)->owner->gid;
    entries[0] = {};
    entries[0].gid.raw[0] = 0xfe;
    entries[0].gid.raw[1] = 0x80;
    entries[0].gid_type = IBV_GID_TYPE_ROCE_V2;
    entries[0].port_num = 1;
    entries[1] = {};
    std::copy(gid.begin(), gid.end(), entries[1].gid.raw);
    entries[1].gid_index = 1;
    entries[1].gid_type = IBV_GID_TYPE_ROCE_V2;
    entries[1].port_num = 1;
    return 2;
  }
  static int GetAsyncEvent(ibv_context* context, ibv_async_event* event) {
    auto* mine = static_cast<F::Context*>(context);
    if (!Wait(mine->async_fd)) return -1;
    const auto lock = Lock();
    *event = mine->events.front();
    mine->events.pop_front();
    ++fabric->made_["event to acknowledge"];
    return 0;
  }
  static void AckAsyncEvent(ibv_async_event*) {
    const auto lock = Lock();
    --fabric->made_["event to acknowledge"];
  }

  static ibv_pd* AllocPd(ibv_context* context) {
    const auto lock = Lock();
    if (fabric->Fails("alloc_pd")) return nullptr;
    auto* pd = Made(new F::Pd(), "protection domain");
    pd->context = context;
    ++static_cast<F::Context*>(context)->children;
    return pd;
  }
  static int DeallocPd(ibv_pd* pd) {
    const auto lock = Lock();
    auto* mine = static_cast<F::Pd*>(pd);
    if (mine->children > 0) return EBUSY;
    --static_cast<F::Context*>(mine->context)->children;
    return Gone(mine, "protection domain");
  }
  static ibv_mr* NewMr(ibv_pd* pd, void* address, size_t bytes, int access) {
    auto* mr = Made(new F::Mr(), "region");
    mr->pd = pd;
    mr->addr = address;
    mr->length = bytes;
    mr->lkey = mr->rkey = fabric->next_number_++;
    mr->access = access;
    ++static_cast<F::Pd*>(pd)->children;
    fabric->mrs_[mr->rkey] = mr;
    return mr;
  }
  static ibv_mr* RegMr(ibv_pd* pd, void* address, size_t bytes, int access) {
    const auto lock = Lock();
    return fabric->Fails("reg_mr") ? nullptr : NewMr(pd, address, bytes, access);
  }
  static ibv_mr* RegDmabufMr(ibv_pd* pd, uint64_t, size_t bytes, uint64_t iova, int, int access) {
    const auto lock = Lock();
    return fabric->Fails("reg_dmabuf_mr") ? nullptr : NewMr(pd, reinterpret_cast<void*>(iova), bytes, access);
  }
  static int DeregMr(ibv_mr* mr) {
    const auto lock = Lock();
    if (fabric->Fails("dereg_mr")) return errno;
    fabric->mrs_.erase(mr->rkey);
    --static_cast<F::Pd*>(mr->pd)->children;
    return Gone(static_cast<F::Mr*>(mr), "region");
  }

  static ibv_comp_channel* CreateCompChannel(ibv_context* context) {
    const auto lock = Lock();
    if (fabric->Fails("create_comp_channel")) return nullptr;
    auto* channel = Made(new F::Channel(), "channel");
    channel->context = context;
    channel->fd = MakeEventFd();
    ++static_cast<F::Context*>(context)->children;
    return channel;
  }
  static int DestroyCompChannel(ibv_comp_channel* channel) {
    const auto lock = Lock();
    if (channel->refcnt > 0) return EBUSY;
    close(channel->fd);
    --static_cast<F::Context*>(channel->context)->children;
    return Gone(static_cast<F::Channel*>(channel), "channel");
  }
  static ibv_cq* CreateCq(ibv_context* context, int entries, void* cq_context, ibv_comp_channel* channel,
                          int) {
    const auto lock = Lock();
    if (fabric->Fails("create_cq")) return nullptr;
    auto* cq = Made(new F::Cq(), "completion queue");
    cq->context = context;
    cq->cq_context = cq_context;
    cq->channel = channel;
    cq->capacity = static_cast<size_t>(entries);
    ++channel->refcnt;
    ++static_cast<F::Context*>(context)->children;
    return cq;
  }
  static int DestroyCq(ibv_cq* cq) {
    const auto lock = Lock();
    auto* mine = static_cast<F::Cq*>(cq);
    if (mine->users > 0) return EBUSY;
    auto* channel = static_cast<F::Channel*>(mine->channel);
    std::erase(channel->ready, mine);
    --channel->refcnt;
    --static_cast<F::Context*>(mine->context)->children;
    return Gone(mine, "completion queue");
  }
  static int GetCqEvent(ibv_comp_channel* channel, ibv_cq** cq, void** context) {
    if (!Wait(channel->fd)) return -1;
    const auto lock = Lock();
    auto& ready = static_cast<F::Channel*>(channel)->ready;
    if (ready.empty()) return -1;  // its queue is gone
    *cq = ready.front();
    *context = ready.front()->cq_context;
    ready.pop_front();
    return 0;
  }
  static void AckCqEvents(ibv_cq*, unsigned int) {}
  static int ReqNotifyCq(ibv_cq* cq, int) {
    const auto lock = Lock();
    static_cast<F::Cq*>(cq)->armed = true;
    return 0;
  }
  static int PollCq(ibv_cq* cq, int entries, ibv_wc* completions) {
    const auto lock = Lock();
    if (fabric->Fails("poll_cq")) return -1;
    auto& queue = static_cast<F::Cq*>(cq)->completions;
    int count = 0;
    for (; count < entries && !queue.empty(); ++count) {
      completions[count] = queue.front();
      queue.pop_front();
    }
    return count;
  }

  static ibv_qp* CreateQp(ibv_pd* pd, ibv_qp_init_attr* attributes) {
    const auto lock = Lock();
    if (fabric->Fails("create_qp")) return nullptr;
    auto* qp = Made(new F::Qp(), "queue pair");
    qp->context = pd->context;
    qp->pd = pd;
    qp->send_cq = attributes->send_cq;
    qp->recv_cq = attributes->recv_cq;
    qp->qp_num = fabric->next_number_++;
    qp->state = IBV_QPS_RESET;
    qp->owner = static_cast<F::Context*>(pd->context)->owner;
    qp->cap = attributes->cap;
    ++static_cast<F::Cq*>(qp->send_cq)->users;
    ++static_cast<F::Pd*>(pd)->children;
    fabric->qps_[qp->qp_num] = qp;
    return qp;
  }
  static int DestroyQp(ibv_qp* qp) {
    const auto lock = Lock();
    if (fabric->Fails("destroy_qp")) return errno;
    auto* mine = static_cast<F::Qp*>(qp);
    std::erase_if(mine->owner->held, [mine](const auto& held) { return held.first == mine; });
    --static_cast<F::Cq*>(mine->send_cq)->users;
    --static_cast<F::Pd*>(mine->pd)->children;
    fabric->qps_.erase(mine->qp_num);
    return Gone(mine, "queue pair");
  }
  static int ModifyQp(ibv_qp* qp, ibv_qp_attr* attributes, int) {
    const auto lock = Lock();
    if (fabric->Fails("modify_qp")) return errno;
    auto* mine = static_cast<F::Qp*>(qp);
    switch (attributes->qp_state) {
      case IBV_QPS_RESET:
        ++mine->life;
        mine->receives.clear();
        mine->waiting.clear();
        mine->unacknowledged.clear();
        std::erase_if(mine->owner->held, [mine](const auto& held) { return held.first == mine; });
        break;
      case IBV_QPS_INIT:
        if (mine->state != IBV_QPS_RESET) return EINVAL;
        break;
      case IBV_QPS_RTR:
        if (mine->state != IBV_QPS_INIT) return EINVAL;
        if (!mine->owner->up) return ENETUNREACH;
        mine->remote = attributes->dest_qp_num;
        mine->psn = attributes->rq_psn;
        std::copy_n(attributes->ah_attr.grh.dgid.raw, 16, mine->remote_gid.begin());
        break;
      case IBV_QPS_RTS:
        if (mine->state != IBV_QPS_RTR) return EINVAL;
        mine->remote_psn = attributes->sq_psn;
        break;
      case IBV_QPS_ERR:
        mine->state = IBV_QPS_ERR;
        fabric->Break(mine);
        break;
      default:
        return EINVAL;
    }
    mine->state = attributes->qp_state;
    return 0;
  }
  static int PostSend(ibv_qp* qp, ibv_send_wr* request, ibv_send_wr** bad) {
    const auto lock = Lock();
    auto* mine = static_cast<F::Qp*>(qp);
    *bad = request;
    if (mine->state != IBV_QPS_RTS && mine->state != IBV_QPS_ERR) return EINVAL;
    if (fabric->Fails("post_send")) return errno;
    if (mine->unacknowledged.size() >= mine->cap.max_send_wr) return ENOMEM;
    F::Packet packet;
    packet.from = mine->qp_num;
    packet.from_life = mine->life;
    packet.to = mine->remote;
    packet.to_psn = mine->remote_psn;
    packet.wr_id = request->wr_id;
    packet.opcode = request->opcode;
    packet.immediate = request->imm_data;
    packet.length = request->sg_list->length;
    packet.remote = request->wr.rdma.remote_addr;
    packet.key = request->wr.rdma.rkey;
    auto* const local = reinterpret_cast<std::byte*>(request->sg_list->addr);
    if (packet.opcode == IBV_WR_RDMA_READ) {
      packet.local = local;
    } else {
      packet.payload.assign(local, local + packet.length);
    }
    mine->unacknowledged.push_back(packet.wr_id);
    fabric->Execute(std::move(packet));
    return 0;
  }
  static int PostRecv(ibv_qp* qp, ibv_recv_wr* request, ibv_recv_wr** bad) {
    const auto lock = Lock();
    auto* mine = static_cast<F::Qp*>(qp);
    *bad = request;
    if (fabric->Fails("post_recv")) return errno;
    if (mine->receives.size() >= mine->cap.max_recv_wr) return ENOMEM;
    mine->receives.emplace_back(request->wr_id, *request->sg_list);
    if (!mine->waiting.empty()) {
      F::Packet packet = std::move(mine->waiting.front());
      mine->waiting.pop_front();
      fabric->Deliver(packet);
    }
    return 0;
  }
  static const char* WcStatusStr(ibv_wc_status status) {
    return status == IBV_WC_RETRY_EXC_ERR ? "transport retry counter exceeded"
                                          : "an error of the fake fabric";
  }
};

FakeFabric::FakeFabric(const std::vector<std::string>& names) {
  MR_CHECK(fabric == nullptr, "one fabric at a time");
  fabric = this;
  using C = FakeCalls;
  verbs_ = {C::GetDeviceList,     C::FreeDeviceList,     C::GetDeviceName, C::OpenDevice,    C::CloseDevice,
            C::QueryDevice,       C::QueryPort,          C::QueryGidTable, C::GetAsyncEvent, C::AckAsyncEvent,
            C::AllocPd,           C::DeallocPd,          C::RegMr,         C::RegDmabufMr,   C::DeregMr,
            C::CreateCompChannel, C::DestroyCompChannel, C::CreateCq,      C::DestroyCq,     C::GetCqEvent,
            C::AckCqEvents,       C::ReqNotifyCq,        C::PollCq,        C::CreateQp,      C::ModifyQp,
            C::DestroyQp,         C::PostSend,           C::PostRecv,      C::WcStatusStr};
  for (size_t i = 0; i < names.size(); ++i) {
    auto device = std::make_unique<Device>();
    device->text = names[i];
    device->gid = {0,
                   0,
                   0,
                   0,
                   0,
                   0,
                   0,
                   0,
                   0,
                   0,
                   0xff,
                   0xff,
                   10,
                   0,
                   static_cast<uint8_t>(i),
                   static_cast<uint8_t>(i + 1)};
    devices_.push_back(std::move(device));
  }
}

FakeFabric::~FakeFabric() {
  for (const auto& [object, free] : objects_) free();
  fabric = nullptr;
}

int FakeFabric::live() const {
  const std::lock_guard lock(mutex_);
  int count = 0;
  for (const auto& [what, number] : made_) count += number;
  return count;
}

std::string FakeFabric::live_text() const {
  const std::lock_guard lock(mutex_);
  std::string text;
  for (const auto& [what, number] : made_) text += number == 0 ? "" : fmt::format("{} {}; ", number, what);
  return text;
}

void FakeFabric::FailCall(const std::string& function, int n, int error) {
  const std::lock_guard lock(mutex_);
  faults_[function] = {n, error};
}

void FakeFabric::Heal() {
  const std::lock_guard lock(mutex_);
  faults_.clear();
}

bool FakeFabric::Fails(const char* function) {
  const auto found = faults_.find(function);
  if (found == faults_.end() || --found->second.calls_left > 0) return false;
  errno = found->second.error;
  return true;
}

FakeFabric::Device* FakeFabric::Find(const std::string& name) const {
  for (const auto& device : devices_) {
    if (device->text == name) return device.get();
  }
  MR_CHECK(false, "no device {}", name);
}

FakeFabric::Qp* FakeFabric::FindQp(uint32_t number) const {
  const auto found = qps_.find(number);
  return found == qps_.end() ? nullptr : found->second;
}

void FakeFabric::Execute(Packet packet) {
  Qp* const from = FindQp(packet.from);
  if (from->state == IBV_QPS_ERR) return Complete(from, packet, IBV_WC_WR_FLUSH_ERR);
  if (!from->owner->up) {
    Complete(from, packet, IBV_WC_LOC_QP_OP_ERR);
    return Break(from);
  }
  if (packet.opcode != IBV_WR_SEND && from->owner->next_data != IBV_WC_SUCCESS) {
    Complete(from, packet, std::exchange(from->owner->next_data, IBV_WC_SUCCESS));
    return Break(from);
  }
  if (from->owner->wire == Wire::kBlack) return;
  if (from->owner->wire == Wire::kHold) return network_.push_back(std::move(packet));
  Deliver(packet);
}

// Arrival at the receiver.
void FakeFabric::Deliver(Packet& packet) {
  Qp* const to = FindQp(packet.to);
  Qp* const from = FindQp(packet.from);
  const bool told = from == nullptr || from->life != packet.from_life || packet.completed;
  const auto complete = [&](ibv_wc_status status) {
    if (told) return;
    Complete(from, packet, status);
    if (status != IBV_WC_SUCCESS) Break(from);
  };
  const bool ready =
      to != nullptr && (to->state == IBV_QPS_RTR || to->state == IBV_QPS_RTS) && to->psn == packet.to_psn;
  if (!ready || !to->owner->up) return complete(IBV_WC_RETRY_EXC_ERR);
  if (packet.opcode != IBV_WR_SEND) {
    const auto region = mrs_.find(packet.key);
    const int needed = packet.opcode == IBV_WR_RDMA_READ ? IBV_ACCESS_REMOTE_READ : IBV_ACCESS_REMOTE_WRITE;
    auto* const place = reinterpret_cast<std::byte*>(packet.remote);
    const bool allowed =
        region != mrs_.end() && region->second->pd == to->pd && (region->second->access & needed) != 0 &&
        place >= region->second->addr &&
        place + packet.length <= static_cast<std::byte*>(region->second->addr) + region->second->length;
    if (!allowed) return complete(IBV_WC_REM_ACCESS_ERR);
    if (packet.opcode == IBV_WR_RDMA_READ) {
      if (!told) std::memcpy(packet.local, place, packet.length);
      return complete(IBV_WC_SUCCESS);
    }
    if (to->receives.empty()) return to->waiting.push_back(std::move(packet));
    std::memcpy(place, packet.payload.data(), packet.length);
    if (from != nullptr) from->owner->bytes_written += packet.length;
  }
  if (to->receives.empty()) return to->waiting.push_back(std::move(packet));
  const auto [wr_id, receive] = to->receives.front();
  to->receives.pop_front();
  ibv_wc arrival{};
  arrival.wr_id = wr_id;
  arrival.qp_num = to->qp_num;
  arrival.byte_len = packet.length;
  if (packet.opcode == IBV_WR_SEND) {
    arrival.opcode = IBV_WC_RECV;
    std::memcpy(reinterpret_cast<void*>(receive.addr), packet.payload.data(), packet.length);
  } else {
    arrival.opcode = IBV_WC_RECV_RDMA_WITH_IMM;
    arrival.imm_data = packet.immediate;
  }
  Push(static_cast<Cq*>(to->recv_cq), arrival);
  complete(IBV_WC_SUCCESS);
}

void FakeFabric::Complete(Qp* qp, const Packet& packet, ibv_wc_status status) {
  ibv_wc completion{};
  completion.wr_id = packet.wr_id;
  completion.qp_num = qp->qp_num;
  completion.status = status;
  if (qp->owner->hold_completions) {
    qp->owner->held.emplace_back(qp, completion);
    return;
  }
  if (const auto found = std::find(qp->unacknowledged.begin(), qp->unacknowledged.end(), packet.wr_id);
      found != qp->unacknowledged.end())
    qp->unacknowledged.erase(found);
  Push(static_cast<Cq*>(qp->send_cq), completion);
}

void FakeFabric::Push(Cq* cq, const ibv_wc& completion) {
  if (cq->completions.size() >= cq->capacity) {
    ibv_async_event event{};
    event.event_type = IBV_EVENT_CQ_ERR;
    event.element.cq = cq;
    return Raise(static_cast<Context*>(cq->context)->owner, event);
  }
  cq->completions.push_back(completion);
  if (!std::exchange(cq->armed, false)) return;
  auto* const channel = static_cast<Channel*>(cq->channel);
  channel->ready.push_back(cq);
  Signal(channel->fd);
}

// Into the error state: what is outstanding is flushed. What is in the network stays there.
void FakeFabric::Break(Qp* qp) {
  qp->state = IBV_QPS_ERR;
  ibv_wc flushed{};
  flushed.qp_num = qp->qp_num;
  flushed.status = IBV_WC_WR_FLUSH_ERR;
  for (Packet& packet : network_) packet.completed = packet.completed || packet.from == qp->qp_num;
  for (const uint64_t wr_id : std::exchange(qp->unacknowledged, {})) {
    flushed.wr_id = wr_id;
    Push(static_cast<Cq*>(qp->send_cq), flushed);
  }
  std::erase_if(qp->owner->held, [qp](const auto& held) { return held.first == qp; });
  for (const auto& [wr_id, receive] : std::exchange(qp->receives, {})) {
    flushed.wr_id = wr_id;
    Push(static_cast<Cq*>(qp->recv_cq), flushed);
  }
}

void FakeFabric::Raise(Device* device, ibv_async_event event) {
  for (Context* const context : device->contexts) {
    context->events.push_back(event);
    Signal(context->async_fd);
  }
}

void FakeFabric::SetWire(const std::string& name, Wire wire) {
  const std::lock_guard lock(mutex_);
  Find(name)->wire = wire;
  if (wire != Wire::kGood) return;
  std::deque<Packet> arriving;
  for (Packet& packet : std::exchange(network_, {})) {
    Qp* const from = FindQp(packet.from);
    if (from != nullptr && from->owner->wire == Wire::kHold) {
      network_.push_back(std::move(packet));
    } else {
      arriving.push_back(std::move(packet));
    }
  }
  for (Packet& packet : arriving) Deliver(packet);
}

void FakeFabric::HoldCompletions(const std::string& name, bool hold) {
  const std::lock_guard lock(mutex_);
  Device* const device = Find(name);
  device->hold_completions = hold;
  if (hold) return;
  for (const auto& [qp, completion] : std::exchange(device->held, {})) {
    Packet packet;
    packet.wr_id = completion.wr_id;
    Complete(qp, packet, completion.status);
  }
}

void FakeFabric::FailNextData(const std::string& name, ibv_wc_status status) {
  const std::lock_guard lock(mutex_);
  Find(name)->next_data = status;
}

void FakeFabric::SetPort(const std::string& name, bool up) {
  const std::lock_guard lock(mutex_);
  Device* const device = Find(name);
  device->up = up;
  ibv_async_event event{};
  event.event_type = up ? IBV_EVENT_PORT_ACTIVE : IBV_EVENT_PORT_ERR;
  event.element.port_num = 1;
  Raise(device, event);
  Raise(device, event);  // real ones come twice as well
}

void FakeFabric::SendEvent(const std::string& name, ibv_event_type type) {
  const std::lock_guard lock(mutex_);
  Device* const device = Find(name);
  ibv_async_event event{};
  event.event_type = type;
  event.element.port_num = 1;
  const bool of_queue_pair =
      type == IBV_EVENT_QP_FATAL || type == IBV_EVENT_QP_REQ_ERR || type == IBV_EVENT_QP_ACCESS_ERR;
  for (const auto& [number, qp] : qps_) {
    if (!of_queue_pair || qp->owner != device) continue;
    event.element.qp = qp;
    break;
  }
  Raise(device, event);
}

void FakeFabric::OverrunCq(const std::string& name) {
  const std::lock_guard lock(mutex_);
  Device* const device = Find(name);
  for (const auto& [number, qp] : qps_) {
    if (qp->owner != device) continue;
    ibv_async_event event{};
    event.event_type = IBV_EVENT_CQ_ERR;
    event.element.cq = qp->recv_cq;
    return Raise(device, event);
  }
}

uint64_t FakeFabric::bytes_written(const std::string& name) const {
  const std::lock_guard lock(mutex_);
  return Find(name)->bytes_written;
}

int FakeFabric::queue_pairs(const std::string& name) const {
  const std::lock_guard lock(mutex_);
  int count = 0;
  for (const auto& [number, qp] : qps_) count += qp->owner == Find(name) ? 1 : 0;
  return count;
}

}  // namespace millrace::transfer::rdma
