#pragma once
// What this machine is like, as `millrace doctor` reads it: plain data, so that what follows from it
// (doctor_findings.h) can be tested without such a machine.

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "base/cpu.h"

namespace millrace::server {

struct RdmaPort {
  std::string device;  // "mlx5_0"
  int port = 1;
  std::string state;       // as the kernel says it: "ACTIVE", "DOWN", "INIT", ...
  std::string rate;        // "400 Gb/sec (4X NDR)"
  std::string link_layer;  // "Ethernet" or "InfiniBand"
  std::string interface;   // network interface of the device; empty: none in this namespace
  bool has_gid = false;    // any entry of the GID table is not zero
};

struct Gpu {
  std::string name;
  uint64_t memory_bytes = 0;
  uint64_t memory_free_bytes = 0;
  int compute_major = 0;
  int compute_minor = 0;
};

struct NetworkAddress {
  std::string interface;
  std::string address;  // IPv4
  int prefix_bits = 0;
  int rp_filter = 0;  // in force: the larger of the interface's and all's
};

struct PortFact {
  std::string address;  // as asked
  std::string problem;  // empty: free, or reached
};

struct MachineFacts {
  CpuFeatures cpu;
  int cpus_usable = 0;
  std::optional<double> cpu_quota;  // processors' worth of time that the cgroup grants
  int numa_nodes = 1;
  double read_bytes_per_second = 0;  // all threads over memory that no cache holds; 0: not measured

  uint64_t memory_available_bytes = 0;
  std::optional<uint64_t> memory_limit_bytes;  // the cgroup's
  std::string huge_pages;                      // "always", "madvise" or "never"; empty: the kernel has none

  uint64_t memlock_bytes = 0;  // UINT64_MAX: no limit
  bool may_lock = false;       // 64 MiB were locked
  uint64_t open_files = 0;
  uint64_t shared_memory_bytes = 0;  // size of /dev/shm; 0: there is none

  bool verbs_library = false;  // libibverbs loads
  int verbs_devices = 0;       // /dev/infiniband/uverbs* that this process may open
  std::vector<RdmaPort> rdma;  // by /sys, whether this process may use them or not
  std::string gpu_driver;      // version; empty: none
  std::string gpu_problem;     // why its library could not be asked
  std::vector<Gpu> gpus;
  std::vector<NetworkAddress> addresses;  // IPv4, without loopback
  std::string io_uring_problem;           // empty: works
  std::vector<PortFact> listen;
  std::vector<PortFact> peers;
};

// Looks; changes nothing for longer than it takes. Needs 256 MiB for the bandwidth (left out when there is
// less) and up to three seconds for each peer that does not answer.
MachineFacts ReadMachineFacts(const std::vector<std::string>& listen, const std::vector<std::string>& peers);

// Parts of it that read /sys and /proc below `root` ("" is this machine's).
std::vector<RdmaPort> ReadRdmaPorts(const std::string& root);
std::optional<uint64_t> ReadMemoryLimit(const std::string& root);
std::optional<double> ReadCpuQuota(const std::string& root);

}  // namespace millrace::server
