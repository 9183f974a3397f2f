#include "transfer/rdma/device.h"

#include <arpa/inet.h>
#include <fcntl.h>
#include <fnmatch.h>
#include <sys/mman.h>
#include <sys/resource.h>

#include <algorithm>
#include <bit>
#include <cerrno>
#include <cstring>
#include <thread>

#include "base/log.h"

namespace millrace::transfer::rdma {
namespace {

constexpr size_t kGidEntriesMax = 256;

bool IsIpv4Mapped(const uint8_t* gid) {
  static constexpr std::array<uint8_t, 12> kPrefix = {0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff};
  return std::equal(kPrefix.begin(), kPrefix.end(), gid);
}

bool IsLinkLocal(const uint8_t* gid) { return gid[0] == 0xfe && (gid[1] & 0xc0) == 0x80; }

int GidRank(const ibv_gid_entry& entry) {
  if (entry.gid_type == IBV_GID_TYPE_IB) return 1;
  if (entry.gid_type != IBV_GID_TYPE_ROCE_V2) return 0;
  if (IsIpv4Mapped(entry.gid.raw)) return 4;
  return IsLinkLocal(entry.gid.raw) ? 2 : 3;
}

std::string WhyNotRegistered(int error, size_t bytes, bool writable) {
  switch (error) {
    case ENOMEM:
    case EPERM:
    case EAGAIN: {
      rlimit limit{};
      getrlimit(RLIMIT_MEMLOCK, &limit);
      if (limit.rlim_cur != RLIM_INFINITY && limit.rlim_cur < bytes) {
        return fmt::format(
            "the limit of locked memory is {} bytes: raise it (ulimit -l, LimitMEMLOCK= of the service, or "
            "the "
            "container's memlock limit or IPC_LOCK capability)",
            limit.rlim_cur);
      }
      return "the kernel or the device has no room for it: memory locked by other regions counts, and so "
             "does the "
             "device's own table of regions";
    }
    case EFAULT:
      return writable ? "it is not all mapped, or not writable" : "it is not all mapped";
    case EINVAL:
      return "the device does not take memory of this kind (device memory needs a dma-buf or the vendor's "
             "peer-memory "
             "module; file mappings may be refused)";
    default:
      return std::strerror(error);
  }
}

constexpr int Access(bool writable) {
  return writable ? IBV_ACCESS_LOCAL_WRITE | IBV_ACCESS_REMOTE_WRITE | IBV_ACCESS_REMOTE_READ
                  : IBV_ACCESS_REMOTE_READ;
}

}  // namespace

const ibv_gid_entry* ChooseGid(std::span<const ibv_gid_entry> entries) {
  const ibv_gid_entry* best = nullptr;
  for (const ibv_gid_entry& entry : entries) {
    if (GidRank(entry) == 0) continue;
    if (best == nullptr || GidRank(entry) > GidRank(*best) ||
        (GidRank(entry) == GidRank(*best) && entry.gid_index < best->gid_index)) {
      best = &entry;
    }
  }
  return best;
}

std::string GidText(const std::array<uint8_t, 16>& gid) {
  char text[INET6_ADDRSTRLEN] = "";
  if (IsIpv4Mapped(gid.data())) {
    inet_ntop(AF_INET, gid.data() + 12, text, sizeof(text));
  } else {
    inet_ntop(AF_INET6, gid.data(), text, sizeof(text));
  }
  return text;
}

int CommonPrefixBits(const std::array<uint8_t, 16>& a, const std::array<uint8_t, 16>& b) {
  for (size_t i = 0; i < a.size(); ++i) {
    const auto differing = static_cast<uint8_t>(a[i] ^ b[i]);
    if (differing != 0) return static_cast<int>(i) * 8 + std::countl_zero(differing);
  }
  return 128;
}

StatusOr<std::unique_ptr<Device>> Device::Open(const Verbs* verbs, ibv_device* handle, uint8_t port) {
  std::string name = verbs->get_device_name(handle);
  std::unique_ptr<Device> device(new Device(verbs, name, port));  // its destructor closes what was opened
  device->context_ = verbs->open_device(handle);
  if (device->context_ == nullptr)
    return Unavailable("RDMA device {}: cannot open: {}", name, std::strerror(errno));
  ibv_device_attr attributes{};
  if (const int error = verbs->query_device(device->context_, &attributes); error != 0)
    return Unavailable("RDMA device {}: cannot query: {}", name, std::strerror(error));
  if (port < 1 || port > attributes.phys_port_cnt)
    return NotFound("RDMA device {} has no port {}", name, port);
  device->num_ports_ = attributes.phys_port_cnt;
  if (attributes.phys_port_cnt > 1) device->name_ = fmt::format("{}:{}", name, port);
  device->pd_ = verbs->alloc_pd(device->context_);
  if (device->pd_ == nullptr)
    return ResourceExhausted("RDMA device {}: no protection domain: {}", name, std::strerror(errno));
  const int flags = fcntl(device->context_->async_fd, F_GETFL);
  if (flags < 0 || fcntl(device->context_->async_fd, F_SETFL, flags | O_NONBLOCK) != 0)
    return Unavailable("RDMA device {}: its event descriptor cannot be made non-blocking", name);
  (void)device->Refresh();  // a port that is down now may come up
  return device;
}

Device::~Device() {
  if (pd_ != nullptr && verbs_->dealloc_pd(pd_) != 0)
    LogError("transfer: RDMA device {}: its protection domain is still in use", name_);
  if (context_ != nullptr) verbs_->close_device(context_);
}

Status Device::Refresh() {
  active_ = false;
  ibv_port_attr port{};
  if (const int error = verbs_->query_port(context_, port_, &port); error != 0)
    return Unavailable("RDMA device {}: cannot query the port: {}", name_, std::strerror(error));
  std::vector<ibv_gid_entry> entries(kGidEntriesMax);
  const ssize_t count = verbs_->query_gid_table(context_, entries.data(), entries.size());
  if (count < 0)
    return Unavailable("RDMA device {}: cannot read the GID table: {}", name_,
                       std::strerror(static_cast<int>(-count)));
  entries.resize(static_cast<size_t>(count));
  std::erase_if(entries, [this](const ibv_gid_entry& entry) { return entry.port_num != port_; });
  const ibv_gid_entry* const gid = ChooseGid(entries);
  if (gid == nullptr) {
    return Unavailable(
        "RDMA device {}: no RoCE v2 or InfiniBand address; its network interface may have no IP address",
        name_);
  }
  std::copy_n(gid->gid.raw, address_.gid.size(), address_.gid.begin());
  gid_index_ = static_cast<uint8_t>(gid->gid_index);
  address_.lid = port.lid;
  address_.mtu = port.active_mtu;
  if (port.state != IBV_PORT_ACTIVE) return Unavailable("RDMA device {}: the port is down", name_);
  active_ = true;
  return OkStatus();
}

bool Device::NextEvent(ibv_async_event* event) { return verbs_->get_async_event(context_, event) == 0; }

StatusOr<ibv_mr*> Device::RegisterMemory(std::span<std::byte> memory, bool writable) {
  ibv_mr* const mr = verbs_->reg_mr(pd_, memory.data(), memory.size(), Access(writable));
  if (mr != nullptr) return mr;
  return ResourceExhausted("{} bytes cannot be registered with RDMA device {}: {}", memory.size(), name_,
                           WhyNotRegistered(errno, memory.size(), writable));
}

StatusOr<ibv_mr*> Device::RegisterDmabuf(int fd, uint64_t offset, size_t bytes, uint64_t iova,
                                         bool writable) {
  if (verbs_->reg_dmabuf_mr == nullptr) return Unimplemented("this libibverbs has no dma-buf");
  ibv_mr* const mr = verbs_->reg_dmabuf_mr(pd_, offset, bytes, iova, fd, Access(writable));
  if (mr != nullptr) return mr;
  if (errno == EOPNOTSUPP || errno == ENOTSUP || errno == ENOSYS)
    return Unimplemented("RDMA device {}: its driver has no dma-buf", name_);
  return ResourceExhausted("{} bytes of a dma-buf cannot be registered with RDMA device {}: {}", bytes, name_,
                           WhyNotRegistered(errno, bytes, writable));
}

void Device::DeregisterMemory(ibv_mr* mr) {
  if (const int error = verbs_->dereg_mr(mr); error != 0)
    LogError("transfer: RDMA device {}: a region stays registered: {}", name_, std::strerror(error));
}

std::vector<std::unique_ptr<Device>> OpenDevices(const Verbs* verbs, std::span<const std::string> include,
                                                 std::span<const std::string> exclude) {
  std::vector<std::unique_ptr<Device>> devices;
  int count = 0;
  ibv_device** const list = verbs->get_device_list(&count);
  if (list == nullptr) return devices;
  for (int i = 0; i < count; ++i) {
    int ports = 1;
    for (int port = 1; port <= ports; ++port) {
      auto device = Device::Open(verbs, list[i], static_cast<uint8_t>(port));
      if (!device.ok()) {
        LogWarning("transfer: {}", Message(device.status()));
        break;
      }
      ports = (*device)->num_ports();
      const std::string address = GidText((*device)->address().gid);
      const auto matches = [&](const std::string& pattern) {
        return fnmatch(pattern.c_str(), (*device)->name().c_str(), 0) == 0 ||
               fnmatch(pattern.c_str(), address.c_str(), 0) == 0;
      };
      if (std::any_of(exclude.begin(), exclude.end(), matches)) continue;
      if (!include.empty() && std::none_of(include.begin(), include.end(), matches)) continue;
      devices.push_back(*std::move(device));
    }
  }
  verbs->free_device_list(list);
  std::sort(devices.begin(), devices.end(),
            [](const auto& a, const auto& b) { return a->name() < b->name(); });
  return devices;
}

void Populate(std::span<std::byte> memory, bool writable, int threads) {
  constexpr size_t kPage = 4096;
  constexpr size_t kWorthAThread = 64 << 20;
  const auto first = reinterpret_cast<uintptr_t>(memory.data()) / kPage * kPage;
  const auto last = (reinterpret_cast<uintptr_t>(memory.data()) + memory.size() + kPage - 1) / kPage * kPage;
  const size_t shares =
      std::clamp<size_t>((last - first) / kWorthAThread, 1, static_cast<size_t>(std::max(threads, 1)));
  const size_t share = ((last - first) / shares + kPage - 1) / kPage * kPage;
  std::vector<std::jthread> workers;
  for (uintptr_t at = first; at < last; at += share) {
    workers.emplace_back([at, bytes = std::min<size_t>(share, last - at), writable] {
      (void)madvise(reinterpret_cast<void*>(at), bytes, writable ? MADV_POPULATE_WRITE : MADV_POPULATE_READ);
    });
  }
}

}  // namespace millrace::transfer::rdma
