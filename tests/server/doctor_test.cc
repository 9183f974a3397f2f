#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <algorithm>
#include <filesystem>
#include <fstream>

#include "server/cli/doctor_findings.h"

namespace millrace::server {
namespace {

using testing::ElementsAre;
using testing::HasSubstr;
using testing::IsEmpty;

constexpr uint64_t kGiB = uint64_t{1} << 30;

// A machine with nothing to complain of: RDMA, a Hopper GPU, room.
MachineFacts GoodMachine() {
  MachineFacts facts;
  facts.cpu.avx2_fma = facts.cpu.avx512 = facts.cpu.avx512_vnni = true;
  facts.cpu.model_name = "Processor";
  facts.cpus_usable = 32;
  facts.read_bytes_per_second = 200e9;
  facts.memory_available_bytes = 256 * kGiB;
  facts.huge_pages = "madvise";
  facts.memlock_bytes = UINT64_MAX;
  facts.may_lock = true;
  facts.open_files = 1 << 20;
  facts.shared_memory_bytes = kGiB;
  facts.verbs_library = true;
  facts.verbs_devices = 1;
  facts.rdma = {{"mlx5_0", 1, "ACTIVE", "400 Gb/sec", "Ethernet", "net1", true}};
  facts.gpu_driver = "580.1";
  facts.gpus = {{"H100", 80 * kGiB, 79 * kGiB, 9, 0}};
  facts.addresses = {{"eth0", "10.0.0.1", 24, 1}, {"net1", "10.1.0.1", 24, 1}};
  return facts;
}

constexpr Needs kAll{.rdma = true, .gpu = true, .memory_bytes = 28 * kGiB};

std::vector<std::string> Topics(const std::vector<Finding>& findings, Severity severity) {
  std::vector<std::string> topics;
  for (const Finding& finding : findings) {
    if (finding.severity == severity) topics.push_back(finding.topic);
  }
  return topics;
}

TEST(Doctor, FindsNothingWrongWithAGoodMachine) {
  const auto findings = Judge(GoodMachine(), kAll);
  EXPECT_THAT(Topics(findings, Severity::kProblem), IsEmpty());
  EXPECT_THAT(Topics(findings, Severity::kNote), IsEmpty());
}

struct Case {
  const char* name;
  void (*spoil)(MachineFacts*);
  const char* topic;
  Severity needed;            // when RDMA and a GPU are required
  Severity otherwise;         // when they are not
  const char* mend;           // part of it
  bool note_as_well = false;  // a note says which one, the problem that none is left
};

class Spoilt : public testing::TestWithParam<Case> {};

TEST_P(Spoilt, MachineIsFoundOut) {
  const Case& spoilt = GetParam();
  MachineFacts facts = GoodMachine();
  spoilt.spoil(&facts);
  for (const bool needed : {true, false}) {
    const auto findings = Judge(facts, needed ? kAll : Needs{.memory_bytes = kAll.memory_bytes});
    const Severity severity = needed ? spoilt.needed : spoilt.otherwise;
    for (const Severity other : {Severity::kProblem, Severity::kNote}) {
      const auto topics = Topics(findings, other);
      const bool expected = other == severity || (spoilt.note_as_well && severity == Severity::kProblem);
      EXPECT_EQ(std::count(topics.begin(), topics.end(), spoilt.topic) > 0, expected) << needed;
    }
    if (severity == Severity::kGood) continue;
    const auto found = std::find_if(findings.begin(), findings.end(), [&](const Finding& finding) {
      return finding.topic == spoilt.topic && finding.severity == severity;
    });
    ASSERT_NE(found, findings.end());
    EXPECT_THAT(found->mend, HasSubstr(spoilt.mend));
    EXPECT_FALSE(found->why.empty());
  }
}

constexpr Severity kGood = Severity::kGood;
constexpr Severity kNote = Severity::kNote;
constexpr Severity kProblem = Severity::kProblem;

INSTANTIATE_TEST_SUITE_P(
    Doctor, Spoilt,
    testing::Values(
        Case{"no_avx2", [](MachineFacts* m) { m->cpu = {}; }, "processor", kNote, kNote, "AVX2"},
        Case{"quota", [](MachineFacts* m) { m->cpu_quota = 8.5; }, "processor time", kNote, kNote,
             "--threads 8"},
        Case{"memory", [](MachineFacts* m) { m->memory_available_bytes = 20 * kGiB; }, "memory", kProblem,
             kProblem, "--kv-memory"},
        Case{"limit", [](MachineFacts* m) { m->memory_limit_bytes = 27 * kGiB; }, "memory", kProblem,
             kProblem, "limit"},
        Case{"huge_pages", [](MachineFacts* m) { m->huge_pages = "never"; }, "huge pages", kNote, kNote,
             "madvise"},
        Case{"no_shm", [](MachineFacts* m) { m->shared_memory_bytes = 0; }, "shared memory", kNote, kNote,
             "/dev/shm"},
        Case{"memlock", [](MachineFacts* m) { m->may_lock = false; }, "locked memory", kProblem, kNote,
             "LimitMEMLOCK"},
        Case{"no_rdma", [](MachineFacts* m) { m->rdma.clear(); }, "rdma", kProblem, kGood, "device plugin"},
        Case{"no_uverbs", [](MachineFacts* m) { m->verbs_devices = 0; }, "rdma", kProblem, kNote, "limits"},
        Case{"no_verbs", [](MachineFacts* m) { m->verbs_library = false; }, "rdma", kProblem, kNote,
             "ibverbs-providers"},
        Case{"port_down", [](MachineFacts* m) { m->rdma[0].state = "DOWN"; }, "rdma", kProblem, kNote, "",
             true},
        Case{"no_gid", [](MachineFacts* m) { m->rdma[0].has_gid = false; }, "rdma", kProblem, kNote, "",
             true},
        Case{"subnet", [](MachineFacts* m) { m->addresses[1].address = "10.0.0.2"; }, "network", kNote, kNote,
             "rp_filter=2"},
        Case{"no_gpu", [](MachineFacts* m) { m->gpus.clear(), m->gpu_driver.clear(); }, "gpu", kProblem,
             kGood, "nvidia.com/gpu"},
        Case{"other_gpu", [](MachineFacts* m) { m->gpus[0].compute_major = 8; }, "gpu", kProblem, kNote, "",
             true},
        Case{"few_files", [](MachineFacts* m) { m->open_files = 1024; }, "open files", kNote, kNote,
             "ulimit"},
        Case{"no_files", [](MachineFacts* m) { m->open_files = 256; }, "open files", kProblem, kProblem,
             "ulimit"},
        Case{"io_uring", [](MachineFacts* m) { m->io_uring_problem = "no"; }, "io_uring", kNote, kNote,
             "seccomp"},
        Case{"port",
             [](MachineFacts* m) {
               m->listen = {{"a:1", "in use"}};
             },
             "port", kProblem, kProblem, "port"},
        Case{"peer",
             [](MachineFacts* m) {
               m->peers = {{"a:1", "refused"}};
             },
             "peer", kProblem, kProblem, "network policies"}),
    [](const testing::TestParamInfo<Case>& param) { return std::string(param.param.name); });

TEST(Doctor, ToleratesASharedSubnetWithALooseFilter) {
  MachineFacts facts = GoodMachine();
  facts.addresses = {{"eth0", "10.0.0.1", 16, 2}, {"net1", "10.0.3.1", 16, 2}};
  EXPECT_THAT(Topics(Judge(facts, kAll), kNote), IsEmpty());
  facts.addresses[1].rp_filter = 1;
  EXPECT_THAT(Topics(Judge(facts, kAll), kNote), ElementsAre("network"));
  facts.addresses[1].address = "10.1.3.1";
  EXPECT_THAT(Topics(Judge(facts, kAll), kNote), IsEmpty());
}

// A root directory with files as the kernel shows them.
class DoctorFacts : public testing::Test {
 protected:
  DoctorFacts() : root_(testing::TempDir() + "doctor-" + std::to_string(getpid())) {}
  ~DoctorFacts() override { std::filesystem::remove_all(root_); }
  void File(const std::string& path, const std::string& text) {
    const std::filesystem::path whole = root_ + path;
    std::filesystem::create_directories(whole.parent_path());
    std::ofstream(whole) << text << "\n";
  }
  const std::string root_;
};

TEST_F(DoctorFacts, ReadsPortsOfEveryAdapter) {
  EXPECT_THAT(ReadRdmaPorts(root_), IsEmpty());
  const std::string zero = "0000:0000:0000:0000:0000:0000:0000:0000";
  const std::string first = "/sys/class/infiniband/mlx5_0/";
  File(first + "ports/1/state", "4: ACTIVE");
  File(first + "ports/1/rate", "400 Gb/sec (4X NDR)");
  File(first + "ports/1/link_layer", "Ethernet");
  File(first + "ports/1/gids/0", "fe80:0000:0000:0000:0ac0:ebff:fe00:0001");
  File(first + "ports/1/gids/1", "0000:0000:0000:0000:0000:ffff:0a01:0001");
  File(first + "ports/2/state", "1: DOWN");
  File(first + "ports/2/link_layer", "Ethernet");
  File(first + "ports/2/gids/0", "fe80:0000:0000:0000:0ac0:ebff:fe00:0002");
  File(first + "device/net/net1/mtu", "9000");
  const std::string second = "/sys/class/infiniband/mlx5_1/";
  File(second + "ports/1/state", "2: INIT");
  File(second + "ports/1/link_layer", "InfiniBand");
  File(second + "ports/1/gids/0", "fe80:0000:0000:0000:0ac0:ebff:fe00:0003");
  File(second + "ports/1/gids/1", zero);
  const auto ports = ReadRdmaPorts(root_);
  ASSERT_EQ(ports.size(), 3U);
  EXPECT_EQ(ports[0].device, "mlx5_0");
  EXPECT_EQ(ports[0].state, "ACTIVE");
  EXPECT_EQ(ports[0].interface, "net1");
  EXPECT_TRUE(ports[0].has_gid);
  EXPECT_EQ(ports[1].port, 2);
  EXPECT_EQ(ports[1].state, "DOWN");
  EXPECT_FALSE(ports[1].has_gid) << "link-local on Ethernet";
  EXPECT_EQ(ports[2].state, "INIT");
  EXPECT_TRUE(ports[2].has_gid) << "InfiniBand's own";
}

TEST_F(DoctorFacts, ReadsLimitsOfBothVersionsOfCgroups) {
  EXPECT_EQ(ReadMemoryLimit(root_), std::nullopt);
  EXPECT_EQ(ReadCpuQuota(root_), std::nullopt);
  File("/sys/fs/cgroup/memory/memory.limit_in_bytes", "9223372036854771712");
  File("/sys/fs/cgroup/cpu/cpu.cfs_quota_us", "-1");
  File("/sys/fs/cgroup/cpu/cpu.cfs_period_us", "100000");
  EXPECT_EQ(ReadMemoryLimit(root_), std::nullopt);
  EXPECT_EQ(ReadCpuQuota(root_), std::nullopt);
  File("/sys/fs/cgroup/memory/memory.limit_in_bytes", "1073741824");
  File("/sys/fs/cgroup/cpu/cpu.cfs_quota_us", "250000");
  EXPECT_EQ(ReadMemoryLimit(root_), kGiB);
  EXPECT_DOUBLE_EQ(ReadCpuQuota(root_).value(), 2.5);
  File("/sys/fs/cgroup/memory.max", "max");
  File("/sys/fs/cgroup/cpu.max", "max 100000");
  EXPECT_EQ(ReadMemoryLimit(root_), std::nullopt);
  EXPECT_EQ(ReadCpuQuota(root_), std::nullopt);
  File("/sys/fs/cgroup/memory.max", "2147483648");
  File("/sys/fs/cgroup/cpu.max", "800000 100000");
  EXPECT_EQ(ReadMemoryLimit(root_), 2 * kGiB);
  EXPECT_DOUBLE_EQ(ReadCpuQuota(root_).value(), 8);
}

}  // namespace
}  // namespace millrace::server
