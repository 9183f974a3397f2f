#pragma once
// RDMA devices of this machine: which ports there are, how they are addressed, and memory registered with
// them.

#include <array>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "transfer/rdma/verbs.h"

namespace millrace::transfer::rdma {

// How a port is reached. Plain data; travels to the peer.
struct Address {
  std::array<uint8_t, 16> gid{};
  uint16_t lid = 0;            // InfiniBand only
  ibv_mtu mtu = IBV_MTU_1024;  // the port's active one
  bool operator==(const Address&) const = default;
};

// The entry of a port's GID table to use: RoCE v2 before InfiniBand's own, IPv4-mapped before global IPv6
// before link-local; the lowest index of the best. RoCE v1 is no choice: it cannot be routed, and a v1 entry
// cannot talk to a v2 one. Null when nothing fits. Pure.
const ibv_gid_entry* ChooseGid(std::span<const ibv_gid_entry> entries);
// "10.77.0.1" for an IPv4-mapped GID, else the 16 bytes as IPv6 text.
std::string GidText(const std::array<uint8_t, 16>& gid);
// Rails that share more leading bits are likelier to be one fabric: how many of the 128.
int CommonPrefixBits(const std::array<uint8_t, 16>& a, const std::array<uint8_t, 16>& b);

// One port of one device, with a protection domain of its own. Registration: any thread. Everything else: the
// transfer thread. Destroy what was made from it first.
class Device {
 public:
  // Opens port `port` of `device`. Errors name device, port and what failed; nothing stays open after one.
  static StatusOr<std::unique_ptr<Device>> Open(const Verbs* verbs, ibv_device* device, uint8_t port);
  ~Device();

  const std::string& name() const { return name_; }  // "mlx5_0", or "mlx5_1:2" on devices with several ports
  ibv_context* context() const { return context_; }
  ibv_pd* pd() const { return pd_; }
  const Verbs& verbs() const { return *verbs_; }
  uint8_t port() const { return port_; }
  int num_ports() const { return num_ports_; }  // of the physical device

  // Asks the port again. Unavailable when it is down or has no usable GID; then address() keeps what it was.
  Status Refresh();
  const Address& address() const { return address_; }
  uint8_t gid_index() const { return gid_index_; }
  bool active() const { return active_; }

  // The next asynchronous event, without blocking; false when there is none.
  bool NextEvent(ibv_async_event* event);
  int async_fd() const { return context_->async_fd; }

  // Pins memory and lets the device use it. `writable`: peers may write (else they may only read). Errors
  // explain themselves: the locked-memory limit, memory that is not mapped, a device's own limit.
  StatusOr<ibv_mr*> RegisterMemory(std::span<std::byte> memory, bool writable);
  // Memory of another device (a GPU), named by a dma-buf: `iova` is what addresses in it will be called.
  // Unimplemented when library or driver lack dma-buf; the caller may then try RegisterMemory on the device
  // pointer, which works with the vendor's peer-memory module.
  StatusOr<ibv_mr*> RegisterDmabuf(int fd, uint64_t offset, size_t bytes, uint64_t iova, bool writable);
  void DeregisterMemory(ibv_mr* mr);

 private:
  Device(const Verbs* verbs, std::string name, uint8_t port)
      : verbs_(verbs), name_(std::move(name)), port_(port) {}

  const Verbs* const verbs_;
  std::string name_;
  const uint8_t port_;
  ibv_context* context_ = nullptr;
  ibv_pd* pd_ = nullptr;
  int num_ports_ = 1;
  bool active_ = false;
  Address address_;
  uint8_t gid_index_ = 0;
};

// Opens every port of every device that the shell patterns (on its name or the text of its address) let
// through: `exclude` wins, an empty `include` is everything. Sorted by name. A device that cannot be opened
// is logged and left out; one whose port is down now is kept: it may come up. None at all, or no kernel
// support, is an empty list.
std::vector<std::unique_ptr<Device>> OpenDevices(const Verbs* verbs, std::span<const std::string> include,
                                                 std::span<const std::string> exclude);

// Touches every page of `memory` from several threads, so that registration, which pins page by page, finds
// them there. Content stays as it is. A kernel that cannot do it is no error: registration then takes longer.
void Populate(std::span<std::byte> memory, bool writable, int threads);

}  // namespace millrace::transfer::rdma
