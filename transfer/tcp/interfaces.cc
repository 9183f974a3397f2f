#include "transfer/tcp/interfaces.h"

#include <arpa/inet.h>
#include <fnmatch.h>
#include <ifaddrs.h>
#include <net/if.h>
#include <netinet/in.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstring>
#include <optional>

namespace millrace::transfer {
namespace {

struct Address {
  int bits = 0;  // 32 or 128
  std::array<uint8_t, 16> bytes{};
  bool loopback = false;
  bool any = false;
};

std::optional<Address> Parse(const std::string& host) {
  Address address;
  if (inet_pton(AF_INET, host.c_str(), address.bytes.data()) == 1) {
    address.bits = 32;
    address.loopback = address.bytes[0] == 127;
  } else if (inet_pton(AF_INET6, host.c_str(), address.bytes.data()) == 1) {
    address.bits = 128;
    address.loopback = host == "::1";
  } else {
    return std::nullopt;
  }
  address.any = std::all_of(address.bytes.begin(), address.bytes.end(), [](uint8_t b) { return b == 0; });
  return address;
}

// Common leading bits; -1 when the two cannot meet.
int Nearness(const Address& a, const Address& b) {
  if (a.bits != b.bits) return -1;
  if (a.any || b.any) return 0;
  if (a.loopback != b.loopback) return -1;
  for (int bit = 0; bit < a.bits; ++bit) {
    const auto at = static_cast<size_t>(bit / 8);
    if (((a.bytes[at] ^ b.bytes[at]) & (0x80U >> (bit % 8))) != 0) return bit;
  }
  return a.bits;
}

bool MatchesAny(const std::vector<std::string>& patterns, const InterfaceAddress& address) {
  return std::any_of(patterns.begin(), patterns.end(), [&](const std::string& pattern) {
    return fnmatch(pattern.c_str(), address.interface.c_str(), 0) == 0 ||
           fnmatch(pattern.c_str(), address.host.c_str(), 0) == 0;
  });
}

bool IsBridge(const std::string& interface) {
  static constexpr const char* kPatterns[] = {"docker*",  "virbr*", "br-*",  "cni*",
                                              "flannel*", "cali*",  "kube-*"};
  return std::any_of(std::begin(kPatterns), std::end(kPatterns),
                     [&](const char* pattern) { return fnmatch(pattern, interface.c_str(), 0) == 0; });
}

}  // namespace

StatusOr<std::vector<InterfaceAddress>> LocalAddresses() {
  ifaddrs* list = nullptr;
  if (getifaddrs(&list) != 0) return Unavailable("cannot list network interfaces: {}", std::strerror(errno));
  std::vector<InterfaceAddress> found;
  for (const ifaddrs* entry = list; entry != nullptr; entry = entry->ifa_next) {
    if (entry->ifa_addr == nullptr || (entry->ifa_flags & IFF_UP) == 0) continue;
    char text[INET6_ADDRSTRLEN] = {};
    if (entry->ifa_addr->sa_family == AF_INET) {
      const auto* v4 = reinterpret_cast<const sockaddr_in*>(entry->ifa_addr);
      inet_ntop(AF_INET, &v4->sin_addr, text, sizeof(text));
    } else if (entry->ifa_addr->sa_family == AF_INET6) {
      const auto* v6 = reinterpret_cast<const sockaddr_in6*>(entry->ifa_addr);
      if (IN6_IS_ADDR_LINKLOCAL(&v6->sin6_addr)) continue;
      inet_ntop(AF_INET6, &v6->sin6_addr, text, sizeof(text));
    } else {
      continue;
    }
    found.push_back({entry->ifa_name, text, (entry->ifa_flags & IFF_LOOPBACK) != 0});
  }
  freeifaddrs(list);
  return found;
}

std::vector<std::string> UsableHosts(const std::vector<InterfaceAddress>& all, const Options& options) {
  std::vector<std::string> hosts;
  for (const InterfaceAddress& address : all) {
    const bool wanted = options.include.empty() ? !address.loopback && !IsBridge(address.interface)
                                                : MatchesAny(options.include, address);
    if (wanted && !MatchesAny(options.exclude, address)) hosts.push_back(address.host);
  }
  return hosts;
}

std::vector<std::pair<size_t, size_t>> JoinRails(const std::vector<std::string>& local,
                                                 const std::vector<std::string>& remote) {
  struct Candidate {
    int nearness;
    size_t apart;  // equally near ones are joined in order
    size_t local, remote;
  };
  std::vector<Candidate> candidates;
  for (size_t l = 0; l < local.size(); ++l) {
    const auto a = Parse(local[l]);
    for (size_t r = 0; r < remote.size(); ++r) {
      const auto b = Parse(remote[r]);
      if (!a || !b) continue;
      const int nearness = Nearness(*a, *b);
      if (nearness >= 0) candidates.push_back({nearness, l > r ? l - r : r - l, l, r});
    }
  }
  std::stable_sort(candidates.begin(), candidates.end(), [](const Candidate& a, const Candidate& b) {
    return a.nearness != b.nearness ? a.nearness > b.nearness : a.apart < b.apart;
  });
  std::vector<std::pair<size_t, size_t>> pairs;
  std::vector<int> local_uses(local.size()), remote_uses(remote.size());
  // First each with a partner of its own; then whoever is left joins the least used one that it can meet.
  for (const Candidate& c : candidates) {
    if (local_uses[c.local] > 0 || remote_uses[c.remote] > 0) continue;
    ++local_uses[c.local], ++remote_uses[c.remote];
    pairs.emplace_back(c.local, c.remote);
  }
  for (int uses = 1; uses <= static_cast<int>(std::max(local.size(), remote.size())); ++uses) {
    for (const Candidate& c : candidates) {
      const bool left = local_uses[c.local] == 0 || remote_uses[c.remote] == 0;
      if (!left || std::max(local_uses[c.local], remote_uses[c.remote]) > uses) continue;
      ++local_uses[c.local], ++remote_uses[c.remote];
      pairs.emplace_back(c.local, c.remote);
    }
  }
  std::sort(pairs.begin(), pairs.end(), [](const auto& a, const auto& b) { return a.second < b.second; });
  return pairs;
}

}  // namespace millrace::transfer
