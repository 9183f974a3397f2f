// Ranks are processes, and die: killed or stopped at random points of their steps, one or two at a time,
// again and again. The others go on within a bound, nothing that anybody computes is wrong, and whoever comes
// back is let in.
//
// MILLRACE_GROUP_KILLS says how many (default 40), MILLRACE_GROUP_SEED where to begin.

#include <gtest/gtest.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstdlib>
#include <thread>

#include "tests/engine/expert_group_rig.h"

namespace millrace::engine {
namespace {

constexpr int kRanks = 4;
constexpr int kScriptSteps = 40;
constexpr auto kHeartbeatMax = std::chrono::milliseconds(1000);
constexpr auto kHung = std::chrono::seconds(120);

struct Shared {
  std::atomic<uint64_t> steps[kRanks];
  std::atomic<uint64_t> wrong;   // digests
  std::atomic<uint64_t> failed;  // unexpected errors
};

int64_t FromEnvironment(const char* name, int64_t otherwise) {
  const char* const text = std::getenv(name);
  return text == nullptr ? otherwise : std::strtoll(text, nullptr, 10);
}

constexpr int kCastOut = 4;

[[noreturn]] void RankMain(int rank, const GroupCase& c, const TensorSource& source, const GroupPlace& place,
                           const std::vector<uint64_t>& expected, Shared& shared) {
  const auto fail = [&](const Status& status) {
    if (status.code() == absl::StatusCode::kFailedPrecondition) _exit(kCastOut);
    fmt::print(stderr, "rank {}: {}\n", rank, Message(status));
    ++shared.failed;
    _exit(5);
  };
  StatusOr<GroupRank> started = StartRank(c, source, place, rank, kRanks, /*redundant=*/1, {}, kHeartbeatMax);
  // The file of a stopped process stays locked until that has gone.
  if (!started.ok()) fail(started.status());
  GroupScript script(static_cast<uint64_t>(rank) + 1, c.v2);
  while (true) {
    script.Restart();
    std::ranges::fill(started->backend->kv_memory(), std::byte{0});
    for (int i = 0; i < kScriptSteps; ++i) {
      const StatusOr<uint64_t> digest = script.Next(*started->backend);
      if (!digest.ok()) fail(digest.status());
      if (*digest != expected[static_cast<size_t>(i)]) {
        fmt::print(stderr, "rank {}: step {} is wrong\n", rank, i);
        ++shared.wrong;
        _exit(3);
      }
      ++shared.steps[rank];
    }
  }
}

class Killer {
 public:
  Killer(const GroupCase& c, const TensorSource& source, uint64_t seed)
      : case_(c), source_(source), random_(seed), expected_(Expected(c, source, kRanks, kScriptSteps)) {
    void* const memory =
        mmap(nullptr, sizeof(Shared), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    shared_ = new (memory) Shared();
    for (int r = 0; r < kRanks; ++r) Start(r);
  }
  ~Killer() {
    for (const pid_t pid : pids_) {
      kill(pid, SIGKILL);
      waitpid(pid, nullptr, 0);
    }
    munmap(shared_, sizeof(Shared));
  }

  // True once every one of these ranks has done `steps` more.
  bool Progress(const std::vector<int>& ranks, uint64_t steps) {
    uint64_t aim[kRanks];
    for (const int r : ranks) aim[r] = shared_->steps[r] + steps;
    const TimePoint until = Clock::System().Now() + kHung;
    for (const int r : ranks) {
      while (shared_->steps[r] < aim[r]) {
        if (Clock::System().Now() > until) return false;
        Revive(ranks);
        std::this_thread::sleep_for(std::chrono::microseconds(200));
      }
    }
    return true;
  }

  // On a machine that does not let a process run for a second, one is cast out that nobody has stopped.
  void Revive(const std::vector<int>& ranks) {
    for (const int r : ranks) {
      int status = 0;
      if (waitpid(pids_[r], &status, WNOHANG) != pids_[r]) continue;
      if (!WIFEXITED(status) || WEXITSTATUS(status) != kCastOut) ++shared_->failed;
      ++starved_;
      Start(r);
    }
  }
  int starved() const { return starved_; }

  void Start(int rank) {
    const pid_t pid = fork();
    if (pid == 0) RankMain(rank, case_, source_, *place_, expected_[static_cast<size_t>(rank)], *shared_);
    pids_[rank] = pid;
  }

  // Returns the time until the survivors had done two more steps each.
  Duration Round(bool stop, int victims) {
    std::this_thread::sleep_for(std::chrono::microseconds(random_.Below(8000)));
    std::vector<int> lost, others;
    const auto first = static_cast<int>(random_.Below(kRanks));
    for (int r = 0; r < kRanks; ++r) {
      ((r - first + kRanks) % kRanks < victims ? lost : others).push_back(r);
    }
    const TimePoint begun = Clock::System().Now();
    for (const int r : lost) kill(pids_[r], stop ? SIGSTOP : SIGKILL);
    EXPECT_TRUE(Progress(others, 2)) << "hung without rank " << first;
    const Duration took = Clock::System().Now() - begun;
    for (const int r : lost) {
      if (stop) {
        // It finds out that it is no member any more, and ends by itself.
        kill(pids_[r], SIGCONT);
      }
      int status = 0;
      waitpid(pids_[r], &status, 0);
      if (stop) {
        EXPECT_TRUE(WIFEXITED(status));
        EXPECT_EQ(WEXITSTATUS(status), kCastOut);
      }
      Start(r);
    }
    EXPECT_TRUE(Progress({0, 1, 2, 3}, 1)) << "hung with rank " << first << " back";
    return took;
  }
  const Shared& shared() const { return *shared_; }

 private:
  const GroupCase case_;
  const TensorSource& source_;
  Random random_;
  const std::unique_ptr<GroupPlace> place_ = MakeGroupPlace(kRanks);
  const std::vector<std::vector<uint64_t>> expected_;
  Shared* shared_ = nullptr;
  pid_t pids_[kRanks] = {};
  int starved_ = 0;
};

void Report(const char* what, std::vector<Duration> times) {
  if (times.empty()) return;
  std::sort(times.begin(), times.end());
  fmt::print("{}: {} times; recovery median {:.1f} ms, 95 % {:.1f} ms, worst {:.1f} ms\n", what, times.size(),
             1e3 * Seconds(times[times.size() / 2]), 1e3 * Seconds(times[times.size() * 95 / 100]),
             1e3 * Seconds(times.back()));
}

TEST(ExpertGroupKill, SurvivorsGoOn) {
  const auto kills = FromEnvironment("MILLRACE_GROUP_KILLS", 40);
  const RandomTensors source(11);
  Killer killer(GroupCase{}, source, static_cast<uint64_t>(FromEnvironment("MILLRACE_GROUP_SEED", 1)));
  ASSERT_TRUE(killer.Progress({0, 1, 2, 3}, 3));
  std::vector<Duration> one, two, stopped;
  for (int64_t i = 0; i < kills && !::testing::Test::HasFailure(); ++i) {
    if (i % 10 == 9) {
      stopped.push_back(killer.Round(/*stop=*/true, 1));
    } else if (i % 10 == 4) {
      two.push_back(killer.Round(/*stop=*/false, 2));
    } else {
      one.push_back(killer.Round(/*stop=*/false, 1));
    }
  }
  Report("one of 4 ranks killed", one);
  Report("two of 4 ranks killed", two);
  Report("one of 4 ranks stopped", stopped);
  fmt::print("{} times a rank was cast out for want of a processor\n", killer.starved());
  EXPECT_EQ(killer.shared().wrong, 0U);
  EXPECT_EQ(killer.shared().failed, 0U);
}

}  // namespace
}  // namespace millrace::engine
