#include "server/cli/doctor_findings.h"

#include <fmt/format.h>

#include <limits>

namespace millrace::server {
namespace {

constexpr uint64_t kGiB = uint64_t{1} << 30;
constexpr uint64_t kOpenFilesGood = 8192;  // the gateway's 4096 connections, one stream each, and room
constexpr uint64_t kOpenFilesMin = 512;

using Findings = std::vector<Finding>;

Finding Good(std::string topic, std::string what) {
  return {std::move(topic), Severity::kGood, std::move(what), "", ""};
}

std::string Size(uint64_t bytes) {
  return bytes >= kGiB ? fmt::format("{:.1f} GiB", static_cast<double>(bytes) / static_cast<double>(kGiB))
                       : fmt::format("{:.0f} MiB", static_cast<double>(bytes) / (1 << 20));
}

void Processor(const MachineFacts& facts, Findings* found) {
  const char* const kernels = facts.cpu.avx512_vnni ? "AVX-512 with VNNI"
                              : facts.cpu.avx512    ? "AVX-512"
                              : facts.cpu.avx2_fma  ? "AVX2"
                                                    : nullptr;
  const std::string name = fmt::format("{}, {} usable, {} NUMA node{}", facts.cpu.model_name,
                                       facts.cpus_usable, facts.numa_nodes, facts.numa_nodes == 1 ? "" : "s");
  if (kernels != nullptr) {
    found->push_back(Good("processor", fmt::format("{}; kernels for {}", name, kernels)));
  } else {
    found->push_back(
        {"processor", Severity::kNote, name + "; has no AVX2",
         "the CPU backend computes with portable kernels, many times slower",
         "use a processor with AVX2 or AVX-512, or --backend cuda; in a virtual machine, let the host's "
         "features through"});
  }
  if (facts.cpu_quota && *facts.cpu_quota + 0.01 < facts.cpus_usable) {
    found->push_back(
        {"processor time", Severity::kNote,
         fmt::format("the container may use {:.1f} processors' time on {} processors", *facts.cpu_quota,
                     facts.cpus_usable),
         "with a thread per processor every step waits for the next time slice",
         fmt::format("set --threads {} or raise the CPU limit; whole processors (static CPU manager "
                     "policy) are best",
                     std::max(1, static_cast<int>(*facts.cpu_quota)))});
  }
}

void Bandwidth(const MachineFacts& facts, Findings* found) {
  const double rate = facts.read_bytes_per_second;
  if (rate <= 0) return;
  // Borders between what machines of each kind reach with all their channels in use.
  const char* const kind = rate < 30e9 ? "a small machine's" : rate < 120e9 ? "a desktop's" : "a server's";
  found->push_back(
      Good("memory bandwidth",
           fmt::format("{:.0f} GB/s read by all threads just now, {} class; decode on the CPU is bound by it",
                       rate / 1e9, kind)));
}

void Memory(const MachineFacts& facts, const Needs& needs, Findings* found) {
  const uint64_t limit = facts.memory_limit_bytes.value_or(std::numeric_limits<uint64_t>::max());
  const uint64_t usable = std::min(limit, facts.memory_available_bytes);
  const std::string what =
      fmt::format("{} available{}", Size(facts.memory_available_bytes),
                  facts.memory_limit_bytes ? fmt::format(", limit of the container {}", Size(limit)) : "");
  if (needs.memory_bytes > usable) {
    found->push_back({"memory", Severity::kProblem,
                      fmt::format("{}; {} are needed", what, Size(needs.memory_bytes)),
                      "the kernel ends a process that goes beyond, in the middle of requests",
                      "a larger limit or machine, a smaller --kv-memory, or --quantize int8 or int4"});
  } else {
    found->push_back(Good("memory", what));
  }
  if (facts.huge_pages == "never" || facts.huge_pages.empty()) {
    found->push_back({"huge pages", Severity::kNote, "transparent huge pages are off",
                      "weights lie in pages of 4 KiB, and the processor spends time on looking them up",
                      "echo madvise > /sys/kernel/mm/transparent_hugepage/enabled, on the node"});
  } else {
    found->push_back(Good("huge pages", fmt::format("transparent huge pages: {}", facts.huge_pages)));
  }
  if (facts.shared_memory_bytes == 0) {
    found->push_back({"shared memory", Severity::kNote, "there is no /dev/shm",
                      "Millrace keeps nothing there, but GPU libraries do when several GPUs work together",
                      "mount a tmpfs at /dev/shm (Kubernetes: an emptyDir with medium Memory)"});
  } else {
    found->push_back(Good("shared memory", fmt::format("/dev/shm has {}", Size(facts.shared_memory_bytes))));
  }
}

void LockedMemory(const MachineFacts& facts, const Needs& needs, Findings* found) {
  const std::string limit =
      facts.memlock_bytes == UINT64_MAX ? "no limit" : fmt::format("limit {}", Size(facts.memlock_bytes));
  if (facts.may_lock) {
    found->push_back(Good("locked memory", fmt::format("64 MiB could be locked ({})", limit)));
    return;
  }
  const bool has_rdma = needs.rdma || facts.verbs_devices > 0;
  if (!has_rdma) {
    found->push_back(Good("locked memory", fmt::format("{}; only RDMA needs more", limit)));
    return;
  }
  found->push_back({"locked memory", needs.rdma ? Severity::kProblem : Severity::kNote,
                    fmt::format("64 MiB could not be locked ({})", limit),
                    "an adapter reads and writes KV pages by itself, so the kernel must not move them; "
                    "without that the RDMA rails "
                    "stay unused and TCP carries everything",
                    "raise the limit where containers are started (LimitMEMLOCK=infinity for containerd or "
                    "CRI-O, then restart it). "
                    "Adding the capability IPC_LOCK to the pod does nothing for a process that is not root"});
}

void Rdma(const MachineFacts& facts, const Needs& needs, Findings* found) {
  const Severity missing = needs.rdma ? Severity::kProblem : Severity::kNote;
  if (facts.rdma.empty()) {
    if (!needs.rdma) {
      found->push_back(Good("rdma", "no adapter; rails are TCP"));
      return;
    }
    found->push_back(
        {"rdma", missing, "no adapter in /sys/class/infiniband", "RDMA rails were asked for",
         "load the adapter's driver on the node (ibv_devices lists it then); in Kubernetes ask for the "
         "device plugin's resource"});
    return;
  }
  if (facts.verbs_devices == 0) {
    found->push_back(
        {"rdma", missing,
         fmt::format("{} adapter port(s) exist, but no /dev/infiniband/uverbs* may be opened here",
                     facts.rdma.size()),
         "rails cannot use an adapter that the container was not given",
         "in Kubernetes ask for the device plugin's resource in limits; otherwise pass /dev/infiniband in"});
  }
  if (!facts.verbs_library) {
    found->push_back({"rdma", missing, "libibverbs.so.1 cannot be loaded",
                      "RDMA rails speak to adapters through it", "install ibverbs-providers"});
  }
  int usable = 0;
  for (const RdmaPort& port : facts.rdma) {
    const std::string name = fmt::format("{} port {} ({}{}{})", port.device, port.port, port.link_layer,
                                         port.interface.empty() ? "" : ", ", port.interface);
    if (port.state != "ACTIVE") {
      found->push_back({"rdma", Severity::kNote, fmt::format("{} is {}", name, port.state),
                        "this rail carries nothing until it is up; the others do",
                        port.link_layer == "InfiniBand" ? "check the cable, and that a subnet manager runs"
                                                        : "check the cable and that the interface is up"});
    } else if (!port.has_gid) {
      found->push_back(
          {"rdma", Severity::kNote, fmt::format("{} has no address (GID) here", name),
           "on Ethernet, peers reach an adapter by the address of its network interface",
           "give the interface an address in this network namespace; in Kubernetes, a secondary network "
           "(Multus) on the adapter"});
    } else {
      ++usable;
      found->push_back(Good("rdma", fmt::format("{} is active, {}", name, port.rate)));
    }
  }
  if (usable == 0 && needs.rdma) {
    found->push_back({"rdma", Severity::kProblem, "no port is active and has an address",
                      "RDMA rails were asked for", "see the ports above"});
  }
}

std::string Subnet(const NetworkAddress& address) {
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (std::sscanf(address.address.c_str(), "%u.%u.%u.%u", &a, &b, &c, &d) != 4) return "";
  const uint32_t whole = (a << 24) | (b << 16) | (c << 8) | d;
  const uint32_t mask = address.prefix_bits == 0 ? 0 : ~uint32_t{0} << (32 - address.prefix_bits);
  return fmt::format("{:08x}/{}", whole & mask, address.prefix_bits);
}

void SharedSubnets(const MachineFacts& facts, Findings* found) {
  for (size_t i = 0; i < facts.addresses.size(); ++i) {
    for (size_t j = i + 1; j < facts.addresses.size(); ++j) {
      const NetworkAddress& one = facts.addresses[i];
      const NetworkAddress& two = facts.addresses[j];
      if (one.interface == two.interface || Subnet(one).empty() || Subnet(one) != Subnet(two)) continue;
      if (one.rp_filter != 1 && two.rp_filter != 1) continue;
      found->push_back({"network", Severity::kNote,
                        fmt::format("{} ({}) and {} ({}) are in one subnet, and rp_filter is strict",
                                    one.interface, one.address, two.interface, two.address),
                        "the kernel drops what arrives on the interface that it would not answer through, so "
                        "one of the two rails "
                        "stays silent",
                        fmt::format("sysctl -w net.ipv4.conf.all.rp_filter=2 net.ipv4.conf.{}.rp_filter=2 "
                                    "net.ipv4.conf.{}.rp_filter=2, or a subnet for each rail",
                                    one.interface, two.interface)});
    }
  }
}

void Gpus(const MachineFacts& facts, const Needs& needs, Findings* found) {
  if (facts.gpu_driver.empty() && facts.gpus.empty()) {
    if (!needs.gpu) {
      found->push_back(Good("gpu", "none; the CPU computes"));
      return;
    }
    found->push_back({"gpu", Severity::kProblem, "no NVIDIA driver is visible here",
                      "--backend cuda was asked for",
                      "install the driver on the node; in Kubernetes ask for nvidia.com/gpu in limits (and "
                      "runtimeClassName nvidia where it is not the default)"});
    return;
  }
  int hopper = 0;
  for (const Gpu& gpu : facts.gpus) {
    const std::string what =
        fmt::format("{}, {} of {} free, driver {}", gpu.name, Size(gpu.memory_free_bytes),
                    Size(gpu.memory_bytes), facts.gpu_driver);
    if (gpu.compute_major == 9) {
      ++hopper;
      found->push_back(Good("gpu", what));
    } else {
      found->push_back(
          {"gpu", Severity::kNote, what,
           fmt::format("the CUDA kernels are made for Hopper (compute capability 9.0); this is {}.{}",
                       gpu.compute_major, gpu.compute_minor),
           "use an H100, H200 or H20, or --backend cpu"});
    }
  }
  if (needs.gpu && hopper == 0) {
    found->push_back(
        {"gpu", Severity::kProblem,
         facts.gpu_problem.empty() ? "no Hopper GPU may be used here" : facts.gpu_problem,
         "--backend cuda was asked for",
         "in Kubernetes ask for nvidia.com/gpu in limits; elsewhere pass the device and the driver's "
         "libraries in"});
  }
}

void Limits(const MachineFacts& facts, Findings* found) {
  if (facts.open_files < kOpenFilesGood) {
    found->push_back(
        {"open files", facts.open_files < kOpenFilesMin ? Severity::kProblem : Severity::kNote,
         fmt::format("at most {}", facts.open_files),
         "a gateway needs one for each connection and a few for each worker; at the limit new connections "
         "wait",
         "raise it (LimitNOFILE, ulimit -n) or lower --connections-max"});
  } else {
    found->push_back(Good("open files", fmt::format("at most {}", facts.open_files)));
  }
  if (facts.io_uring_problem.empty()) {
    found->push_back(Good("io_uring", "works"));
  } else {
    found->push_back(
        {"io_uring", Severity::kNote, facts.io_uring_problem,
         "the prefix cache's file (--kv-disk-size) is read and written through it; nothing else is",
         "leave --kv-disk-size at 0, or allow it: sysctl kernel.io_uring_disabled=0, and a seccomp profile "
         "that lets it through (the container runtimes' default ones do not)"});
  }
}

void Network(const MachineFacts& facts, Findings* found) {
  for (const PortFact& port : facts.listen) {
    if (port.problem.empty()) {
      found->push_back(Good("port", port.address + " is free"));
    } else {
      found->push_back({"port", Severity::kProblem, fmt::format("{}: {}", port.address, port.problem),
                        "the server could not listen there",
                        "end what listens there, or choose another port"});
    }
  }
  for (const PortFact& peer : facts.peers) {
    if (peer.problem.empty()) {
      found->push_back(Good("peer", peer.address + " answers"));
    } else {
      found->push_back(
          {"peer", Severity::kProblem, fmt::format("{}: {}", peer.address, peer.problem),
           "requests cannot be handed over between the two",
           "check that it runs, its name, and that routes, firewalls and network policies let the port "
           "through"});
    }
  }
}

}  // namespace

std::vector<Finding> Judge(const MachineFacts& facts, const Needs& needs) {
  Findings found;
  Processor(facts, &found);
  Bandwidth(facts, &found);
  Memory(facts, needs, &found);
  LockedMemory(facts, needs, &found);
  Rdma(facts, needs, &found);
  SharedSubnets(facts, &found);
  Gpus(facts, needs, &found);
  Limits(facts, &found);
  Network(facts, &found);
  return found;
}

}  // namespace millrace::server
