#include "server/cli/doctor_facts.h"

#include <arpa/inet.h>
#include <dlfcn.h>
#include <fcntl.h>
#include <ifaddrs.h>
#include <liburing.h>
#include <net/if.h>
#include <poll.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/statvfs.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <bit>
#include <cerrno>
#include <chrono>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <sstream>
#include <thread>

#include "base/file.h"
#include "base/net.h"
#include "server/cli/doctor_gpu.h"

namespace millrace::server {
namespace {

namespace fs = std::filesystem;

constexpr size_t kReadBytes = size_t{256} << 20;
constexpr size_t kLockBytes = size_t{64} << 20;
constexpr int kConnectMs = 3000;

// All of a small file; empty when there is none. The kernel's files say a size of 0, so ReadFile is not for
// them.
std::string Text(const std::string& path) {
  std::ifstream file(path);
  std::ostringstream text;
  text << file.rdbuf();
  return text.str();
}

std::string Line(const std::string& path) {
  const std::string text = Text(path);
  return text.substr(0, text.find('\n'));
}

std::vector<std::string> Names(const std::string& directory) {
  std::vector<std::string> names;
  std::error_code error;
  for (fs::directory_iterator it(directory, error), end; !error && it != end; it.increment(error)) {
    names.push_back(it->path().filename().string());
  }
  std::sort(names.begin(), names.end());
  return names;
}

// "[always] madvise never" -> "always".
std::string Chosen(const std::string& line) {
  const size_t begin = line.find('[');
  const size_t end = line.find(']');
  return begin == std::string::npos || end < begin ? "" : line.substr(begin + 1, end - begin - 1);
}

uint64_t MemoryAvailable() {
  const std::string text = Text("/proc/meminfo");
  const size_t at = text.find("MemAvailable:");
  if (at == std::string::npos) return 0;
  return std::strtoull(text.c_str() + at + std::strlen("MemAvailable:"), nullptr, 10) << 10;
}

// Every thread sums its part of memory that was just written, so that pages exist; larger than any cache that
// one process of a shared machine should count on.
double ReadBandwidth(int threads) {
  void* const memory =
      mmap(nullptr, kReadBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);
  if (memory == MAP_FAILED) return 0;
  const auto* const words = static_cast<const uint64_t*>(memory);
  const size_t part = kReadBytes / sizeof(uint64_t) / static_cast<size_t>(threads);
  double best = 0;
  std::atomic<uint64_t> sink{0};
  for (int round = 0; round < 3; ++round) {
    const auto begin = std::chrono::steady_clock::now();
    {
      std::vector<std::jthread> readers;
      for (int i = 0; i < threads; ++i) {
        readers.emplace_back([&, i] {
          uint64_t sum[8] = {};
          const uint64_t* const from = words + static_cast<size_t>(i) * part;
          for (size_t at = 0; at + 8 <= part; at += 8) {
            for (size_t lane = 0; lane < 8; ++lane) sum[lane] += from[at + lane];
          }
          for (const uint64_t lane : sum) sink += lane;
        });
      }
    }
    const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
    best = std::max(best, static_cast<double>(part * sizeof(uint64_t)) * threads / seconds);
  }
  munmap(memory, kReadBytes);
  return best;
}

bool MayLock() {
  void* const memory = mmap(nullptr, kLockBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) return false;
  const bool locked = mlock(memory, kLockBytes) == 0;
  munmap(memory, kLockBytes);
  return locked;
}

uint64_t Limit(__rlimit_resource resource) {
  rlimit limit{};
  if (getrlimit(resource, &limit) != 0) return 0;
  return limit.rlim_cur == RLIM_INFINITY ? UINT64_MAX : limit.rlim_cur;
}

int OpenableVerbsDevices() {
  int count = 0;
  for (const std::string& name : Names("/dev/infiniband")) {
    if (name.starts_with("uverbs") &&
        UniqueFd(open(("/dev/infiniband/" + name).c_str(), O_RDWR | O_CLOEXEC)).valid())
      ++count;
  }
  return count;
}

bool VerbsLibrary() {
  void* const library = dlopen("libibverbs.so.1", RTLD_NOW | RTLD_LOCAL);
  if (library != nullptr) dlclose(library);
  return library != nullptr;
}

int ReverseFilter(const std::string& interface) {
  const std::string root = "/proc/sys/net/ipv4/conf/";
  return std::max(std::atoi(Line(root + "all/rp_filter").c_str()),
                  std::atoi(Line(root + interface + "/rp_filter").c_str()));
}

std::vector<NetworkAddress> Addresses() {
  std::vector<NetworkAddress> found;
  ifaddrs* list = nullptr;
  if (getifaddrs(&list) != 0) return found;
  for (const ifaddrs* entry = list; entry != nullptr; entry = entry->ifa_next) {
    if (entry->ifa_addr == nullptr || entry->ifa_netmask == nullptr || entry->ifa_addr->sa_family != AF_INET)
      continue;
    if ((entry->ifa_flags & IFF_LOOPBACK) != 0 || (entry->ifa_flags & IFF_UP) == 0) continue;
    char text[INET_ADDRSTRLEN] = {};
    inet_ntop(AF_INET, &reinterpret_cast<const sockaddr_in*>(entry->ifa_addr)->sin_addr, text, sizeof(text));
    const uint32_t mask = reinterpret_cast<const sockaddr_in*>(entry->ifa_netmask)->sin_addr.s_addr;
    found.push_back({entry->ifa_name, text, std::popcount(mask), ReverseFilter(entry->ifa_name)});
  }
  freeifaddrs(list);
  return found;
}

std::string IoUringProblem() {
  io_uring ring{};
  const int error = io_uring_queue_init(2, &ring, 0);
  if (error == 0) io_uring_queue_exit(&ring);
  return error == 0 ? "" : fmt::format("is not permitted or not there: {}", std::strerror(-error));
}

// The one address that `text` names, as a socket address; the problem otherwise.
std::string SocketAddress(const std::string& text, sockaddr_storage* address, socklen_t* bytes) {
  const StatusOr<HostPort> named = ParseHostPort(text);
  if (!named.ok()) return std::string(Message(named.status()));
  const StatusOr<std::vector<HostPort>> resolved = Resolve(*named);
  if (!resolved.ok()) return std::string(Message(resolved.status()));
  auto* const v4 = reinterpret_cast<sockaddr_in*>(address);
  auto* const v6 = reinterpret_cast<sockaddr_in6*>(address);
  const HostPort& first = resolved->front();
  if (inet_pton(AF_INET, first.host.c_str(), &v4->sin_addr) == 1) {
    v4->sin_family = AF_INET;
    v4->sin_port = htons(first.port);
    *bytes = sizeof(*v4);
  } else if (inet_pton(AF_INET6, first.host.c_str(), &v6->sin6_addr) == 1) {
    v6->sin6_family = AF_INET6;
    v6->sin6_port = htons(first.port);
    *bytes = sizeof(*v6);
  } else {
    return fmt::format("'{}' is no address", first.host);
  }
  return "";
}

std::string ListenProblem(const std::string& text) {
  sockaddr_storage address{};
  socklen_t bytes = 0;
  if (std::string problem = SocketAddress(text, &address, &bytes); !problem.empty()) return problem;
  const UniqueFd socket_fd(socket(address.ss_family, SOCK_STREAM | SOCK_CLOEXEC, 0));
  const int on = 1;
  setsockopt(socket_fd.get(), SOL_SOCKET, SO_REUSEADDR, &on, sizeof(on));
  const auto* const at = reinterpret_cast<const sockaddr*>(&address);
  if (bind(socket_fd.get(), at, bytes) != 0 || listen(socket_fd.get(), 1) != 0) return std::strerror(errno);
  return "";
}

std::string ConnectProblem(const std::string& text) {
  sockaddr_storage address{};
  socklen_t bytes = 0;
  if (std::string problem = SocketAddress(text, &address, &bytes); !problem.empty()) return problem;
  const UniqueFd socket_fd(socket(address.ss_family, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0));
  if (connect(socket_fd.get(), reinterpret_cast<const sockaddr*>(&address), bytes) == 0) return "";
  if (errno != EINPROGRESS) return std::strerror(errno);
  pollfd waiting{socket_fd.get(), POLLOUT, 0};
  if (poll(&waiting, 1, kConnectMs) == 0) return fmt::format("no answer within {} s", kConnectMs / 1000);
  int error = 0;
  socklen_t size = sizeof(error);
  getsockopt(socket_fd.get(), SOL_SOCKET, SO_ERROR, &error, &size);
  return error == 0 ? "" : std::strerror(error);
}

}  // namespace

std::vector<RdmaPort> ReadRdmaPorts(const std::string& root) {
  std::vector<RdmaPort> found;
  const std::string devices = root + "/sys/class/infiniband";
  for (const std::string& device : Names(devices)) {
    const std::vector<std::string> interfaces = Names(fmt::format("{}/{}/device/net", devices, device));
    for (const std::string& number : Names(fmt::format("{}/{}/ports", devices, device))) {
      const std::string at = fmt::format("{}/{}/ports/{}", devices, device, number);
      RdmaPort port;
      port.device = device;
      port.port = std::atoi(number.c_str());
      port.state = Line(at + "/state");  // "4: ACTIVE"
      if (const size_t colon = port.state.find(": "); colon != std::string::npos)
        port.state.erase(0, colon + 2);
      port.rate = Line(at + "/rate");
      port.link_layer = Line(at + "/link_layer");
      if (!interfaces.empty()) port.interface = interfaces.front();
      for (const std::string& index : Names(at + "/gids")) {
        const std::string gid = Line(at + "/gids/" + index);
        if (gid.find_first_not_of("0:") == std::string::npos) continue;
        // A link-local GID of Ethernet leads nowhere beyond the switch; InfiniBand's own begin so and are
        // good.
        if (port.link_layer == "InfiniBand" || !gid.starts_with("fe80:")) port.has_gid = true;
      }
      found.push_back(std::move(port));
    }
  }
  return found;
}

std::optional<uint64_t> ReadMemoryLimit(const std::string& root) {
  std::string text = Line(root + "/sys/fs/cgroup/memory.max");                          // version 2
  if (text.empty()) text = Line(root + "/sys/fs/cgroup/memory/memory.limit_in_bytes");  // version 1
  const uint64_t bytes = std::strtoull(text.c_str(), nullptr, 10);
  // Version 1 says "none" as the largest number of whole pages.
  if (bytes == 0 || bytes > uint64_t{1} << 60) return std::nullopt;
  return bytes;
}

std::optional<double> ReadCpuQuota(const std::string& root) {
  double quota = 0;
  double period = 0;
  if (const std::string line = Line(root + "/sys/fs/cgroup/cpu.max"); !line.empty()) {
    std::istringstream(line) >> quota >> period;  // "max 100000" reads as nothing
  } else {
    quota = std::atof(Line(root + "/sys/fs/cgroup/cpu/cpu.cfs_quota_us").c_str());  // -1: none
    period = std::atof(Line(root + "/sys/fs/cgroup/cpu/cpu.cfs_period_us").c_str());
  }
  if (quota <= 0 || period <= 0) return std::nullopt;
  return quota / period;
}

MachineFacts ReadMachineFacts(const std::vector<std::string>& listen, const std::vector<std::string>& peers) {
  MachineFacts facts;
  facts.cpu = GetCpuFeatures();
  facts.cpus_usable = UsableCpuCount();
  facts.cpu_quota = ReadCpuQuota("");
  const std::vector<std::string> nodes = Names("/sys/devices/system/node");
  facts.numa_nodes = std::max<int>(
      1, static_cast<int>(std::count_if(nodes.begin(), nodes.end(), [](const std::string& name) {
        return name.starts_with("node") && name.find_first_of("0123456789") == 4;
      })));
  facts.memory_available_bytes = MemoryAvailable();
  facts.memory_limit_bytes = ReadMemoryLimit("");
  const uint64_t room = std::min(facts.memory_available_bytes, facts.memory_limit_bytes.value_or(UINT64_MAX));
  if (room >= 4 * kReadBytes) facts.read_bytes_per_second = ReadBandwidth(facts.cpus_usable);
  facts.huge_pages = Chosen(Line("/sys/kernel/mm/transparent_hugepage/enabled"));
  facts.memlock_bytes = Limit(RLIMIT_MEMLOCK);
  facts.may_lock = room >= 2 * kLockBytes && MayLock();
  facts.open_files = Limit(RLIMIT_NOFILE);
  struct statvfs shared {};
  if (statvfs("/dev/shm", &shared) == 0)
    facts.shared_memory_bytes = uint64_t{shared.f_blocks} * shared.f_frsize;
  facts.verbs_library = VerbsLibrary();
  facts.verbs_devices = OpenableVerbsDevices();
  facts.rdma = ReadRdmaPorts("");
  ReadGpus(&facts);
  facts.addresses = Addresses();
  facts.io_uring_problem = IoUringProblem();
  for (const std::string& address : listen) facts.listen.push_back({address, ListenProblem(address)});
  for (const std::string& address : peers) facts.peers.push_back({address, ConnectProblem(address)});
  return facts;
}

}  // namespace millrace::server
