// Whole engines over the system's libibverbs on soft-RoCE rails: runs in the guest of tests/rxe, where
// interface rai is joined to rbi, and the RDMA devices rxai and rxbi are on them. The sender owns rxa*, the
// receiver rxb*. Every rail is shaped to the same rate, so that what a test sees is the scheduling and not
// the guest's single processor.
//
// Nothing is asserted that depends on how much of a processor the guest gets; what was measured is printed
// (RESULT), and is worth something on a machine that does nothing else. Recovery is measured as a caller sees
// it: 64 KiB writes are kept queued, and the time of each one's completion is noted. It ends where the first
// window of 50 ms begins that carries 90 % of what the surviving rails can.
#include <arpa/inet.h>
#include <gtest/gtest.h>
#include <net/if.h>
#include <net/if_arp.h>
#include <netinet/in.h>
#include <signal.h>
#include <sys/ioctl.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <numeric>
#include <thread>

#include "../harness.h"
#include "base/file.h"
#include "transfer/rdma/device.h"

namespace millrace::transfer {
namespace {

constexpr int kRails = 4;
constexpr size_t kMemory = 4 << 20;
constexpr uint64_t kWrite = 64 << 10;
constexpr int kQueued = 128;
constexpr double kMegabit = 1e6 / 8;

int FromEnvironment(const char* name, int otherwise) {
  const char* const text = std::getenv(name);
  return text == nullptr ? otherwise : std::atoi(text);
}
int Trials() { return FromEnvironment("MILLRACE_RXE_TRIALS", 2); }
int RateMbit() { return FromEnvironment("MILLRACE_RXE_MBIT", 12); }
int LateMilliseconds() { return FromEnvironment("MILLRACE_RXE_LATE_MS", 60); }

void Shell(const std::string& command) { ASSERT_EQ(std::system(command.c_str()), 0) << command; }
void Shape(int rail, int mbit) {
  for (const char* const side : {"ra", "rb"})
    Shell(fmt::format("tc qdisc replace dev {}{} root tbf rate {}mbit burst 32k limit 8m", side, rail, mbit));
}

// Faults by system call, not by command: starting a process takes a busy guest longer than what is measured.
class Interface {
 public:
  explicit Interface(std::string name) : name_(std::move(name)), socket_(socket(AF_INET, SOCK_DGRAM, 0)) {}
  void SetUp(bool up) {
    ifreq request{};
    name_.copy(request.ifr_name, IFNAMSIZ - 1);
    ASSERT_EQ(ioctl(socket_.get(), SIOCGIFFLAGS, &request), 0);
    request.ifr_flags = static_cast<short>(up ? request.ifr_flags | IFF_UP : request.ifr_flags & ~IFF_UP);
    ASSERT_EQ(ioctl(socket_.get(), SIOCSIFFLAGS, &request), 0);
  }
  // Where packets to `address` go: to the other end of the cable, or to a station that is not there (a black
  // hole: the link stays up and nothing answers).
  void SetNeighbour(const std::string& address, uint8_t side, uint8_t rail) {
    arpreq request{};
    auto* const to = reinterpret_cast<sockaddr_in*>(&request.arp_pa);
    to->sin_family = AF_INET;
    ASSERT_EQ(inet_pton(AF_INET, address.c_str(), &to->sin_addr), 1);
    request.arp_ha.sa_family = ARPHRD_ETHER;
    const uint8_t station[6] = {2, 0, 0, 0, side, rail};
    std::memcpy(request.arp_ha.sa_data, station, sizeof(station));
    request.arp_flags = ATF_PERM | ATF_COM;
    name_.copy(request.arp_dev, sizeof(request.arp_dev) - 1);
    ASSERT_EQ(ioctl(socket_.get(), SIOCSARP, &request), 0) << std::strerror(errno);
  }

 private:
  std::string name_;
  UniqueFd socket_;
};

void SetRail(int rail, bool up, const char* side) {
  Interface(fmt::format("{}{}", side, rail)).SetUp(up);
  if (!up) return;
  // The kernel forgets fixed neighbours with the link.
  Interface(fmt::format("ra{}", rail))
      .SetNeighbour(fmt::format("10.77.{}.2", rail), 0x0b, static_cast<uint8_t>(rail));
  Interface(fmt::format("rb{}", rail))
      .SetNeighbour(fmt::format("10.77.{}.1", rail), 0x0a, static_cast<uint8_t>(rail));
}

void SetBlackHole(int rail, bool on) {
  const uint8_t a = on ? 0xee : 0x0a;
  const uint8_t b = on ? 0xee : 0x0b;
  Interface(fmt::format("ra{}", rail))
      .SetNeighbour(fmt::format("10.77.{}.2", rail), b, static_cast<uint8_t>(rail));
  Interface(fmt::format("rb{}", rail))
      .SetNeighbour(fmt::format("10.77.{}.1", rail), a, static_cast<uint8_t>(rail));
}

Options GuestOptions(const char* include) {
  Options options = RailOptions(1);
  options.kinds = {"rdma"};
  options.include = {include};
  options.slice_bytes_min = options.slice_bytes_max = 32 << 10;  // 6.5 ms at 40 Mbit/s, 22 ms at 12
  options.late_min = std::chrono::milliseconds(LateMilliseconds());
  return options;
}

// Keeps writes queued and notes when each is done.
class Stream {
 public:
  Stream(Side* sender, PeerId peer, Side* receiver, TicketId ticket)
      : sender_(sender), peer_(peer), receiver_(receiver), ticket_(ticket) {
    for (int i = 0; i < kQueued; ++i) Submit();
  }
  ~Stream() { Stop(); }
  // Not before every byte was written once.
  void Stop() {
    if (stopping_) return;
    EXPECT_TRUE(Eventually([this] { return done().size() >= kMemory / kWrite; }, std::chrono::seconds(60)))
        << "next to nothing is written";
    stopping_ = true;
    EXPECT_TRUE(Eventually([this] { return running_ == 0; }, std::chrono::seconds(60)))
        << "writes that never end";
  }
  int failures() const { return failures_; }
  std::vector<TimePoint> done() const {
    const std::lock_guard lock(mutex_);
    return done_;
  }
  // Bytes per second that completed in a span.
  double Rate(TimePoint from, Duration span) const {
    const std::lock_guard lock(mutex_);
    const auto first = std::lower_bound(done_.begin(), done_.end(), from);
    const auto last = std::lower_bound(done_.begin(), done_.end(), from + span);
    return static_cast<double>(last - first) * kWrite / Seconds(span);
  }

 private:
  void Submit() {
    ++running_;
    const uint64_t at = next_++ % (kMemory / kWrite) * kWrite;
    const Status status = sender_->transfer->Submit(
        peer_, OneIntent(ticket_, sender_->region, at, kWrite, receiver_->region, at), [this](Status result) {
          if (!result.ok()) ++failures_;
          {
            const std::lock_guard lock(mutex_);
            done_.push_back(Clock::System().Now());
          }
          if (!stopping_) Submit();
          --running_;
        });
    if (!status.ok()) {
      ++failures_;
      --running_;
    }
  }
  Side* const sender_;
  const PeerId peer_;
  Side* const receiver_;
  const TicketId ticket_;
  std::atomic<bool> stopping_{false};
  std::atomic<int> running_{0};
  std::atomic<int> failures_{0};
  std::atomic<uint64_t> next_{0};
  mutable std::mutex mutex_;
  std::vector<TimePoint> done_;
};

class Guest : public testing::Test {
 protected:
  void SetUp() override {
    if (access("/sys/class/infiniband/rxa0", F_OK) != 0)
      GTEST_SKIP() << "no soft-RoCE rails: run by tests/rxe/guest";
    for (int i = 0; i < kRails; ++i) Shape(i, RateMbit());
    Begin();
  }
  void TearDown() override {
    if (IsSkipped()) return;
    if (HasFailure()) Explain();
    for (int i = 0; i < kRails; ++i) SetBlackHole(i, false);
    sender_.reset();
    receiver_.reset();
  }
  void Begin() {
    sender_ = std::make_unique<Side>(GuestOptions("rxa*"), kMemory, true, 1);
    receiver_ = std::make_unique<Side>(GuestOptions("rxb*"), kMemory, true, 2);
    peer_ = *sender_->transfer->Open(receiver_->transfer->Descriptor());
    ASSERT_TRUE(Eventually([this] { return NumUp() == kRails; })) << NumUp() << " rails are up";
  }
  std::vector<PathSnapshot> Paths() {
    std::vector<PathSnapshot> paths = sender_->transfer->TakeSnapshot().paths;
    std::erase_if(paths, [](const PathSnapshot& path) { return path.kind != "rdma"; });
    std::sort(paths.begin(), paths.end(),
              [](const auto& a, const auto& b) { return a.local_rail < b.local_rail; });
    return paths;
  }
  // What the paths say, for whoever has to find out why a test failed.
  void Explain() {
    for (const PathSnapshot& path : sender_->transfer->TakeSnapshot().paths) {
      std::printf("%s %s: %s (%s) done %lu in flight %lu trips %lu hedged %lu delay %.1f ms\n",
                  path.kind.c_str(), path.local_rail.c_str(), path.state.c_str(), path.reason.c_str(),
                  path.slices_done, path.bytes_in_flight, path.trips, path.slices_hedged,
                  path.delay_seconds * 1e3);
    }
  }
  int NumUp() {
    const auto paths = Paths();
    return static_cast<int>(
        std::count_if(paths.begin(), paths.end(), [](const auto& path) { return path.state == "up"; }));
  }
  TicketId Grant(Operation operation = Operation::kWrite) {
    return *receiver_->transfer->OpenTicket(sender_->transfer->epoch(), {{receiver_->region, 0, kMemory}},
                                            operation);
  }
  void ExpectWritten() {
    EXPECT_TRUE(std::equal(sender_->memory.begin(), sender_->memory.end(), receiver_->memory.begin()))
        << "a wrong byte";
  }

  struct Recovery {
    std::vector<double> back_ms;    // to 90 % of the survivors
    std::vector<double> healed_ms;  // from the end of the fault until the rail is up
    double before = 0;              // goodput, bytes per second, of the last trial
  };
  // Breaks rail 0 again and again under load.
  template <typename Break, typename Heal>
  void MeasureRecovery(const char* name, Break break_rail, Heal heal) {
    const TicketId ticket = Grant();
    Recovery recovery;
    {
      Stream stream(sender_.get(), peer_, receiver_.get(), ticket);
      for (int trial = 0; trial < Trials(); ++trial) {
        std::this_thread::sleep_for(std::chrono::milliseconds(400));
        ASSERT_TRUE(Eventually([this] { return NumUp() == kRails; }));
        const TimePoint start = Clock::System().Now();
        recovery.before = stream.Rate(start - std::chrono::milliseconds(300), std::chrono::milliseconds(300));
        break_rail();
        std::this_thread::sleep_for(std::chrono::milliseconds(500));
        const TimePoint end = Clock::System().Now();
        // What the survivors carry once things are quiet is the measure, not what they should.
        const double quiet =
            stream.Rate(end - std::chrono::milliseconds(250), std::chrono::milliseconds(250));
        EXPECT_GT(quiet, 0) << "nothing went over the rails that live";
        TimePoint back = start;
        while (back < end - std::chrono::milliseconds(50) &&
               stream.Rate(back, std::chrono::milliseconds(50)) < 0.9 * quiet)
          back += std::chrono::milliseconds(1);
        recovery.back_ms.push_back(Seconds(back - start) * 1e3);
        heal();
        const TimePoint healed = Clock::System().Now();
        EXPECT_TRUE(Eventually([this] { return NumUp() == kRails; }, std::chrono::seconds(30)))
            << "the rail does not come back";
        recovery.healed_ms.push_back(Seconds(Clock::System().Now() - healed) * 1e3);
      }
      stream.Stop();
      EXPECT_EQ(stream.failures(), 0) << "an error reached the caller";
    }
    (void)CloseAndWait(*receiver_->transfer, ticket);
    ExpectWritten();
    const auto show = [](std::vector<double> values) {
      std::sort(values.begin(), values.end());
      return fmt::format("median {:5.0f} worst {:5.0f} ms", values[values.size() / 2], values.back());
    };
    std::printf("RESULT %-16s trials %2zu  goodput before %5.1f MB/s  back to 90 %%: %s  rail up again: %s\n",
                name, recovery.back_ms.size(), recovery.before / 1e6, show(recovery.back_ms).c_str(),
                show(recovery.healed_ms).c_str());
    std::fflush(stdout);
  }

  std::unique_ptr<Side> sender_, receiver_;
  PeerId peer_ = 0;
};

TEST_F(Guest, EqualRailsShareEquallyAndAddUp) {
  const TicketId ticket = Grant();
  Stream stream(sender_.get(), peer_, receiver_.get(), ticket);
  std::this_thread::sleep_for(std::chrono::milliseconds(500));
  const auto before = Paths();
  const TimePoint start = Clock::System().Now();
  std::this_thread::sleep_for(std::chrono::seconds(2));
  const Duration span = Clock::System().Now() - start;
  const auto after = Paths();
  stream.Stop();
  const double rate = stream.Rate(start, span);
  const double sum = kRails * RateMbit() * kMegabit;
  std::string shares;
  for (int i = 0; i < kRails; ++i) {
    const double share = static_cast<double>(after[static_cast<size_t>(i)].bytes_done -
                                             before[static_cast<size_t>(i)].bytes_done) /
                         Seconds(span);
    shares += fmt::format(" {:.1f}", share / 1e6);
    EXPECT_GT(share, 0.1 * rate) << "of a fair quarter, on rail " << i;
  }
  std::printf("RESULT equal rails: %.1f MB/s of %.1f (%.1f %%); per rail%s MB/s\n", rate / 1e6, sum / 1e6,
              100 * rate / sum, shares.c_str());
  EXPECT_EQ(stream.failures(), 0);
  ExpectWritten();
}

TEST_F(Guest, RailsOfDifferentRatesAreUsedInProportion) {
  const int rates[kRails] = {RateMbit() / 4, RateMbit() / 2, RateMbit(), RateMbit()};
  for (int i = 0; i < kRails; ++i) Shape(i, rates[i]);
  const TicketId ticket = Grant();
  Stream stream(sender_.get(), peer_, receiver_.get(), ticket);
  std::this_thread::sleep_for(std::chrono::milliseconds(1000));
  const auto before = Paths();
  const TimePoint start = Clock::System().Now();
  std::this_thread::sleep_for(std::chrono::seconds(2));
  const Duration span = Clock::System().Now() - start;
  const auto after = Paths();
  stream.Stop();
  double sum = 0;
  double carried[kRails] = {};
  std::string shares;
  for (int i = 0; i < kRails; ++i) {
    sum += rates[i] * kMegabit;
    const double share = carried[i] = static_cast<double>(after[static_cast<size_t>(i)].bytes_done -
                                                          before[static_cast<size_t>(i)].bytes_done) /
                                      Seconds(span);
    shares += fmt::format(" {:.1f}/{:.1f}", share / 1e6, rates[i] * kMegabit / 1e6);
  }
  const double rate = stream.Rate(start, span);
  std::printf("RESULT rails 1:2:4:4: %.1f MB/s of %.1f (%.1f %%); per rail%s MB/s\n", rate / 1e6, sum / 1e6,
              100 * rate / sum, shares.c_str());
  EXPECT_GT(carried[0], 0);
  EXPECT_LT(carried[0], carried[3]) << "a rail of a quarter of the rate";
  EXPECT_EQ(stream.failures(), 0);
  ExpectWritten();
}

TEST_F(Guest, ReadsCrossEveryRail) {
  const TicketId ticket = Grant(Operation::kRead);
  std::fill(sender_->memory.begin(), sender_->memory.end(), std::byte{0});
  const Status status = SubmitAndWait(*sender_->transfer, peer_,
                                      OneRead(ticket, sender_->region, 0, kMemory, receiver_->region, 0));
  ASSERT_TRUE(status.ok()) << status;
  ExpectWritten();
  for (const PathSnapshot& path : Paths()) EXPECT_GT(path.bytes_done, kMemory / 20) << path.local_rail;
}

TEST_F(Guest, OwnPortDownAndUp) {
  MeasureRecovery(
      "own port down", [] { SetRail(0, false, "ra"); }, [] { SetRail(0, true, "ra"); });
}

TEST_F(Guest, PeersPortDownAndUp) {
  MeasureRecovery(
      "peer port down", [] { SetRail(0, false, "rb"); }, [] { SetRail(0, true, "rb"); });
}

TEST_F(Guest, BlackHole) {
  MeasureRecovery(
      "black hole", [] { SetBlackHole(0, true); }, [] { SetBlackHole(0, false); });
}

TEST_F(Guest, RateCollapse) {
  MeasureRecovery(
      "rate to a tenth", [] { Shape(0, RateMbit() / 10); }, [] { Shape(0, RateMbit()); });
}

TEST_F(Guest, LossIsSurvived) {
  for (const char* const side : {"ra", "rb"})
    Shell(fmt::format("tc qdisc replace dev {}0 root netem loss 0.5% limit 20000 rate {}mbit", side,
                      RateMbit()));
  const TicketId ticket = Grant();
  const TimePoint start = Clock::System().Now();
  Stream stream(sender_.get(), peer_, receiver_.get(), ticket);
  std::this_thread::sleep_for(std::chrono::seconds(2));
  stream.Stop();
  std::printf("RESULT loss of 0.5 %% on one rail of four: %.1f MB/s of %.1f\n",
              stream.Rate(start, std::chrono::seconds(2)) / 1e6, kRails * RateMbit() * kMegabit / 1e6);
  EXPECT_EQ(stream.failures(), 0);
  ExpectWritten();
}

TEST_F(Guest, ALimitOfLockedMemoryIsExplained) {
  // The limit binds only those without the right to exceed it: a child that is not root.
  const pid_t child = fork();
  if (child == 0) {
    rlimit limit{1 << 20, 1 << 20};
    if (setrlimit(RLIMIT_MEMLOCK, &limit) != 0 || setgid(65534) != 0 || setuid(65534) != 0) _exit(2);
    const auto verbs = rdma::SystemVerbs();
    if (!verbs.ok()) _exit(3);
    int count = 0;
    ibv_device** const list = (*verbs)->get_device_list(&count);
    if (count == 0) _exit(4);
    auto device = rdma::Device::Open(*verbs, list[0], 1);
    if (!device.ok()) {
      std::fprintf(stderr, "%s\n", std::string(Message(device.status())).c_str());
      _exit(5);
    }
    std::vector<std::byte> memory(4 << 20);
    const auto mr = (*device)->RegisterMemory(memory, true);
    if (mr.ok()) _exit(6);
    std::fprintf(stderr, "%s\n", std::string(Message(mr.status())).c_str());
    _exit(Message(mr.status()).find("limit of locked memory is 1048576 bytes") != std::string_view::npos ? 0
                                                                                                         : 7);
  }
  int code = 0;
  ASSERT_EQ(waitpid(child, &code, 0), child);
  EXPECT_EQ(WIFEXITED(code) ? WEXITSTATUS(code) : -1, 0);
}

// Before any engine of this process: a child that only receives.
TEST(GuestProcess, APeerThatIsKilledFailsItsWritesAndNothingElse) {
  if (access("/sys/class/infiniband/rxa0", F_OK) != 0)
    GTEST_SKIP() << "no soft-RoCE rails: run by tests/rxe/guest";
  int to_parent[2], to_child[2];
  ASSERT_EQ(pipe(to_parent), 0);
  ASSERT_EQ(pipe(to_child), 0);
  const pid_t child = fork();
  if (child == 0) {
    Side receiver(GuestOptions("rxb*"), kMemory, true, 2);
    uint64_t epoch = 0;
    if (read(to_child[0], &epoch, sizeof(epoch)) != sizeof(epoch)) _exit(1);
    const TicketId ticket = *receiver.transfer->OpenTicket(epoch, {{receiver.region, 0, kMemory}});
    const std::string descriptor = receiver.transfer->Descriptor();
    const uint64_t words[3] = {ticket, receiver.region, descriptor.size()};
    (void)!write(to_parent[1], words, sizeof(words));
    (void)!write(to_parent[1], descriptor.data(), descriptor.size());
    pause();
    _exit(0);
  }
  Side sender(GuestOptions("rxa*"), kMemory, true, 1);
  const uint64_t epoch = sender.transfer->epoch();
  ASSERT_EQ(write(to_child[1], &epoch, sizeof(epoch)), static_cast<ssize_t>(sizeof(epoch)));
  uint64_t words[3] = {};
  ASSERT_EQ(read(to_parent[0], words, sizeof(words)), static_cast<ssize_t>(sizeof(words)));
  std::string descriptor(words[2], '\0');
  ASSERT_EQ(read(to_parent[0], descriptor.data(), descriptor.size()),
            static_cast<ssize_t>(descriptor.size()));
  const PeerId peer = *sender.transfer->Open(descriptor);
  const auto region = static_cast<RegionId>(words[1]);
  Status status =
      SubmitAndWait(*sender.transfer, peer, OneIntent(words[0], sender.region, 0, kMemory, region, 0));
  ASSERT_TRUE(status.ok()) << status;
  auto done = std::make_shared<std::promise<Status>>();
  ASSERT_TRUE(sender.transfer
                  ->Submit(peer, OneIntent(words[0], sender.region, 0, kMemory, region, 0),
                           [done](Status result) { done->set_value(std::move(result)); })
                  .ok());
  kill(child, SIGKILL);
  const TimePoint start = Clock::System().Now();
  status = done->get_future().get();
  std::printf("RESULT peer killed: its write ends after %.1f s: %s\n", Seconds(Clock::System().Now() - start),
              std::string(Message(status)).c_str());
  EXPECT_TRUE(status.ok() || status.code() == absl::StatusCode::kUnavailable) << status;
  int code = 0;
  waitpid(child, &code, 0);
}

}  // namespace
}  // namespace millrace::transfer
