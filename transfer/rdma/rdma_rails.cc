#include "transfer/rdma/rdma_rails.h"

#include <sys/epoll.h>

#include <algorithm>

#include "base/log.h"

namespace millrace::transfer::rdma {
namespace {

constexpr size_t kTargetsMax = 4096;  // links that peers may hold here

// A rail's address: its GID in hexadecimal, a space, the device's name.
std::string AddressText(const Device& device) {
  std::string text;
  for (const uint8_t byte : device.address().gid) text += fmt::format("{:02x}", byte);
  return text + " " + device.name();
}

StatusOr<std::array<uint8_t, 16>> ParseGid(const std::string& address) {
  std::array<uint8_t, 16> gid{};
  if (address.size() < 34 || address.size() > 256 || address[32] != ' ')
    return InvalidArgument("not an RDMA rail");
  for (size_t i = 0; i < 32; ++i) {
    const char c = address[i];
    const int digit = c >= '0' && c <= '9' ? c - '0' : c >= 'a' && c <= 'f' ? c - 'a' + 10 : -1;
    if (digit < 0) return InvalidArgument("not an RDMA rail");
    gid[i / 2] = static_cast<uint8_t>(gid[i / 2] << 4 | digit);
  }
  return gid;
}

}  // namespace

std::vector<std::pair<size_t, size_t>> PairRails(const std::vector<std::array<uint8_t, 16>>& local,
                                                 const std::vector<std::array<uint8_t, 16>>& remote) {
  std::vector<std::pair<size_t, size_t>> pairs;
  if (local.empty() || remote.empty()) return pairs;
  const bool swapped = local.size() < remote.size();
  const auto& longer = swapped ? remote : local;
  const auto& shorter = swapped ? local : remote;
  std::vector<int> uses(shorter.size());
  for (size_t i = 0; i < longer.size(); ++i) {
    // Of those that still have a turn, the nearest; by index if equal.
    const int turn = *std::min_element(uses.begin(), uses.end());
    size_t best = shorter.size();
    for (size_t j = 0; j < shorter.size(); ++j) {
      if (uses[j] != turn) continue;
      const auto nearness = [&](size_t k) { return CommonPrefixBits(longer[i], shorter[k]); };
      if (best == shorter.size() || nearness(j) > nearness(best)) best = j;
    }
    ++uses[best];
    pairs.emplace_back(swapped ? best : i, swapped ? i : best);
  }
  return pairs;
}

RdmaRails::RdmaRails(const RailEnvironment& environment, StatusOr<const Verbs*> verbs)
    : env_(environment), verbs_(std::move(verbs)) {}

RdmaRails::~RdmaRails() {
  CloseAll();
  for (const auto& device : devices_) env_.loop->Remove(device->async_fd());
  regions_.reset();
}

Status RdmaRails::Start() {
  const auto& kinds = env_.options->kinds;
  const bool asked = std::find(kinds.begin(), kinds.end(), "rdma") != kinds.end();
  if (verbs_.ok()) devices_ = OpenDevices(*verbs_, env_.options->include, env_.options->exclude);
  std::vector<Device*> devices;
  for (const auto& device : devices_) {
    devices.push_back(device.get());
    addresses_.push_back({"rdma", AddressText(*device)});
    env_.loop->Add(device->async_fd(), EPOLLIN,
                   [this, index = devices.size() - 1](uint32_t) { OnDeviceEvents(index); });
    LogInfo("transfer: RDMA device {}: {}, {}", device->name(), GidText(device->address().gid),
            device->active() ? "up" : "down");
  }
  regions_ = std::make_unique<Regions>(devices);
  if (!devices_.empty() || !asked) return OkStatus();
  if (!verbs_.ok()) return verbs_.status();
  return NotFound(
      "RDMA was asked for and this machine has no RDMA device that `include` and `exclude` let through");
}

std::vector<RailAddress> RdmaRails::Addresses() const { return addresses_; }

Status RdmaRails::RegisterRegion(RegionId region, std::span<std::byte> memory, bool writable) {
  if (devices_.empty()) return OkStatus();
  const Status status = regions_->Register(region, memory, writable);
  if (!status.ok()) {
    env_.loop->Post([this] {
      for (size_t i = 0; i < devices_.size(); ++i) {
        if (const Status why = regions_->Usable(i); !why.ok()) BreakDevice(i, why);
      }
    });
  }
  return status;
}

void RdmaRails::DeregisterRegion(RegionId region) { regions_->Deregister(region); }

StatusOr<std::vector<std::unique_ptr<Path>>> RdmaRails::MakePaths(const RemotePeer& peer,
                                                                  ControlChannel* control) {
  std::vector<std::unique_ptr<Path>> paths;
  if (control == nullptr) return paths;  // nothing to arrange a link over
  std::vector<std::array<uint8_t, 16>> local;
  std::vector<std::array<uint8_t, 16>> remote;
  std::vector<std::string> names;
  for (const auto& device : devices_) local.push_back(device->address().gid);
  for (const RailAddress& rail : peer.rails) {
    if (rail.kind != name()) continue;
    MR_ASSIGN_OR_RETURN(const auto gid, ParseGid(rail.address));
    remote.push_back(gid);
    names.push_back(rail.address.substr(33));
  }
  for (const auto& [i, j] : PairRails(local, remote)) {
    const uint64_t link = next_link_++;
    auto path =
        std::make_unique<RdmaPath>(env_.loop, devices_[i].get(), i, regions_.get(), control,
                                   RdmaPath::Target{link, names[j], names[j] + " " + GidText(remote[j])},
                                   [this, link] { paths_.erase(link); });
    paths_.emplace(link, path.get());
    paths.push_back(std::move(path));
  }
  return paths;
}

void RdmaRails::OnControl(ControlChannel* channel, const std::string& body) {
  v1::Message message;
  if (!message.ParseFromString(body))
    return LogWarning("transfer: a damaged RDMA message of a peer is ignored");
  switch (message.kind_case()) {
    case v1::Message::kConnect:
      return OnConnect(message.connect(), channel);
    case v1::Message::kAccept: {
      if (RdmaPath* const path = FindPath(message.accept().link(), channel); path != nullptr)
        path->OnAccept(message.accept());
      return;
    }
    case v1::Message::kBroken: {
      const v1::Broken& broken = message.broken();
      if (!broken.from_initiator()) {
        if (RdmaPath* const path = FindPath(broken.link(), channel); path != nullptr)
          path->OnPeerBroke(broken);
        return;
      }
      const auto found = targets_.find({channel->peer_epoch(), broken.link()});
      if (found != targets_.end()) found->second->OnPeerBroke(broken);
      return;
    }
    case v1::Message::KIND_NOT_SET:
      return;
  }
}

// A peer speaks for its own links alone.
RdmaPath* RdmaRails::FindPath(uint64_t link, const ControlChannel* channel) const {
  const auto found = paths_.find(link);
  return found == paths_.end() || found->second->control() != channel ? nullptr : found->second;
}

void RdmaRails::OnConnect(const v1::Connect& connect, ControlChannel* channel) {
  const LinkName link_name(channel->peer_epoch(), connect.link());
  auto found = targets_.find(link_name);
  const auto refuse = [&](const std::string& why) {
    v1::Message message;
    v1::Accept* const accept = message.mutable_accept();
    accept->set_link(connect.link());
    accept->set_generation(connect.generation());
    accept->set_refusal(why);
    (void)channel->SendMessage("rdma", message.SerializeAsString());
  };
  if (found == targets_.end()) {
    if (targets_.size() >= kTargetsMax) return refuse("too many links");
    const auto device = std::find_if(devices_.begin(), devices_.end(), [&](const auto& candidate) {
      return candidate->name() == connect.rail();
    });
    if (device == devices_.end()) return refuse("there is no such rail");
    const auto index = static_cast<size_t>(device - devices_.begin());
    const RdmaTarget::Environment environment = {env_.loop,    env_.clock,     env_.memory,
                                                 env_.landing, regions_.get(), &counters_};
    found = targets_
                .emplace(link_name, std::make_unique<RdmaTarget>(environment, device->get(), index,
                                                                 link_name.first, link_name.second))
                .first;
  }
  found->second->OnConnect(connect, channel);
}

void RdmaRails::OnControlClosed(ControlChannel* channel) {
  for (const auto& [link_name, target] : targets_) target->ForgetChannel(channel);
}

void RdmaRails::OnTicketClosing(TicketId ticket) {
  const TimePoint now = env_.clock->Now();
  for (const auto& [link_name, target] : targets_) target->OnTicketClosing(ticket, now);
}

TimePoint RdmaRails::Tick(TimePoint now) {
  TimePoint next = kNoDeadline;
  for (const auto& [link, path] : paths_) {
    if (!path->PostDeferred()) next = now + std::chrono::milliseconds(1);
  }
  for (auto it = targets_.begin(); it != targets_.end();) {
    next = std::min(next, it->second->Tick(now));
    if (it->second->Abandoned(now, env_.options->peer_timeout)) {
      it = targets_.erase(it);
      continue;
    }
    if (it->second->Abandoned(now, Duration::zero())) next = std::min(next, now + env_.options->peer_timeout);
    ++it;
  }
  return next;
}

void RdmaRails::CloseAll() { targets_.clear(); }

void RdmaRails::BreakDevice(size_t index, const Status& why) {
  std::vector<RdmaPath*> paths;  // a broken path's owner may do anything, short of destroying it
  for (const auto& [link, path] : paths_) {
    if (path->device() == devices_[index].get()) paths.push_back(path);
  }
  for (RdmaPath* const path : paths) path->Break(why);
  for (const auto& [link_name, target] : targets_) {
    if (target->device() == devices_[index].get()) target->Break(why);
  }
}

template <typename Element>
void RdmaRails::BreakOwner(const Element* element, const Status& why) {
  for (const auto& [link, path] : paths_) {
    if (path->endpoint() != nullptr && path->endpoint()->Owns(element)) return path->endpoint()->Fail(why);
  }
  for (const auto& [link_name, target] : targets_) {
    if (target->endpoint() != nullptr && target->endpoint()->Owns(element))
      return target->endpoint()->Fail(why);
  }
}

void RdmaRails::OnDeviceEvents(size_t index) {
  Device& device = *devices_[index];
  ibv_async_event event{};
  while (device.NextEvent(&event)) {
    const ibv_async_event told = event;
    (*verbs_)->ack_async_event(&event);  // at once: a queue pair cannot be destroyed before its events are
    switch (told.event_type) {
      case IBV_EVENT_PORT_ERR:
      case IBV_EVENT_PORT_ACTIVE:
      case IBV_EVENT_GID_CHANGE:
      case IBV_EVENT_LID_CHANGE:
        // A level, not an edge: events come more than once and may be older than the state. On ports other
        // than this rail's they change nothing.
        if (told.element.port_num == device.port() && told.event_type == IBV_EVENT_PORT_ERR)
          BreakDevice(index, Unavailable("RDMA device {}: the port went down", device.name()));
        break;
      case IBV_EVENT_CQ_ERR:
        BreakOwner(told.element.cq, Unavailable("RDMA device {}: a completion queue overran", device.name()));
        break;
      case IBV_EVENT_QP_FATAL:
      case IBV_EVENT_QP_REQ_ERR:
      case IBV_EVENT_QP_ACCESS_ERR:
      case IBV_EVENT_PATH_MIG_ERR:
        BreakOwner(told.element.qp, Unavailable("RDMA device {}: a queue pair failed (event {})",
                                                device.name(), static_cast<int>(told.event_type)));
        break;
      case IBV_EVENT_DEVICE_FATAL:
        LogError("transfer: RDMA device {} is lost; only a restart of this process brings it back",
                 device.name());
        regions_->Disable(index, Unavailable("RDMA device {} is lost", device.name()));
        BreakDevice(index, regions_->Usable(index));
        break;
      default:
        break;
    }
  }
}

}  // namespace millrace::transfer::rdma
