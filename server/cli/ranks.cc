#include "server/cli/ranks.h"

#include <sched.h>
#include <signal.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstring>
#include <filesystem>
#include <map>
#include <thread>

#include "base/file.h"
#include "base/log.h"
#include "base/net.h"
#include "base/random.h"

namespace millrace::server {
namespace {

using SteadyClock = std::chrono::steady_clock;
constexpr auto kBackoffMin = std::chrono::milliseconds(200);
constexpr auto kBackoffMax = std::chrono::seconds(10);
constexpr auto kCalm =
    std::chrono::seconds(60);  // a rank that ran so long begins with the least backoff again

// "0-3,8" -> {0, 1, 2, 3, 8}. What does not parse is no processor.
std::vector<int> ParseList(const std::string& text) {
  std::vector<int> numbers;
  int first = 0;
  int last = 0;
  for (size_t at = 0; at < text.size();) {
    const size_t end = std::min(text.find(',', at), text.size());
    const std::string part = text.substr(at, end - at);
    const int count = std::sscanf(part.c_str(), "%d-%d", &first, &last);
    if (count == 1) last = first;
    for (int i = first; count > 0 && i <= last; ++i) numbers.push_back(i);
    at = end + 1;
  }
  return numbers;
}

// Processors that this process may use, those of one NUMA node side by side.
std::vector<int> UsableByNode() {
  cpu_set_t usable;
  CPU_ZERO(&usable);
  sched_getaffinity(0, sizeof(usable), &usable);
  std::map<int, int> node_of;
  std::error_code error;
  for (const auto& entry : std::filesystem::directory_iterator("/sys/devices/system/node", error)) {
    const std::string name = entry.path().filename();
    if (name.rfind("node", 0) != 0) continue;
    const StatusOr<std::string> list = ReadFile(entry.path().string() + "/cpulist");
    if (!list.ok()) continue;
    for (const int cpu : ParseList(*list)) node_of[cpu] = std::atoi(name.c_str() + 4);
  }
  std::vector<int> cpus;
  for (int cpu = 0; cpu < CPU_SETSIZE; ++cpu) {
    if (CPU_ISSET(cpu, &usable)) cpus.push_back(cpu);
  }
  std::stable_sort(cpus.begin(), cpus.end(), [&](int a, int b) { return node_of[a] < node_of[b]; });
  return cpus;
}

// This process onto the rank's share; where there are fewer processors than ranks, all share all.
void TakeProcessors(const std::vector<int>& cpus, int rank, int ranks) {
  const auto count = static_cast<int>(cpus.size());
  if (count < ranks) return;
  cpu_set_t mine;
  CPU_ZERO(&mine);
  std::string named;
  for (int i = rank * count / ranks; i < (rank + 1) * count / ranks; ++i) {
    CPU_SET(cpus[static_cast<size_t>(i)], &mine);
    named += fmt::format("{}{}", named.empty() ? "" : ",", cpus[static_cast<size_t>(i)]);
  }
  sched_setaffinity(0, sizeof(mine), &mine);
  LogInfo("rank {}: processors {}", rank, named);
}

// Port p of a group is p + rank for a rank; port 0 is any free one for all.
StatusOr<std::string> PortOf(const std::string& address, int rank) {
  if (address.empty()) return address;
  MR_ASSIGN_OR_RETURN(HostPort parsed, ParseHostPort(address));
  if (parsed.port == 0) return address;
  if (parsed.port + rank > UINT16_MAX)
    return InvalidArgument("{}: no port is left for rank {}", address, rank);
  parsed.port = static_cast<uint16_t>(parsed.port + rank);
  return parsed.ToString();
}

struct Rank {
  WorkerCommandOptions options;
  pid_t pid = -1;
  SteadyClock::time_point started;
  SteadyClock::time_point start_at;
  SteadyClock::duration backoff = kBackoffMin;
  bool first_run = true;
};

class Ranks {
 public:
  using Serve = std::function<Status(const WorkerCommandOptions&)>;
  Ranks(std::vector<Rank> ranks, const Serve& serve)
      : ranks_(std::move(ranks)), serve_(serve), cpus_(UsableByNode()) {
    sigemptyset(&signals_);
    for (const int number : {SIGINT, SIGTERM, SIGCHLD}) sigaddset(&signals_, number);
    sigprocmask(SIG_BLOCK, &signals_, &before_);
  }

  Status Run() {
    for (Rank& rank : ranks_) Start(rank);
    while (!ending_ || Running()) {
      constexpr timespec kLook = {0, 100'000'000};
      const int number = sigtimedwait(&signals_, nullptr, &kLook);
      if (number == SIGINT || number == SIGTERM) {
        if (!ending_) LogInfo("signal {}: ending {} ranks", strsignal(number), ranks_.size());
        EndAll();
      }
      Reap();
      for (Rank& rank : ranks_) {
        if (!ending_ && rank.pid < 0 && SteadyClock::now() >= rank.start_at) Start(rank);
      }
    }
    return outcome_;
  }

 private:
  bool Running() const {
    return std::any_of(ranks_.begin(), ranks_.end(), [](const Rank& rank) { return rank.pid > 0; });
  }

  void EndAll() {
    ending_ = true;
    for (const Rank& rank : ranks_) {
      if (rank.pid > 0) kill(rank.pid, SIGTERM);
    }
  }

  void Start(Rank& rank) {
    const pid_t parent = getpid();
    rank.started = SteadyClock::now();
    rank.pid = fork();
    if (rank.pid != 0) return;
    // No rank outlives the process that was to look after it.
    prctl(PR_SET_PDEATHSIG, SIGTERM);
    if (getppid() != parent) _exit(1);
    sigprocmask(SIG_SETMASK, &before_, nullptr);
    const int number = rank.options.group.rank;
    TakeProcessors(cpus_, number, rank.options.group.ranks);
    const Status status = serve_(rank.options);
    if (!status.ok()) fmt::print(stderr, "millrace: rank {}: {}\n", number, Message(status));
    std::fflush(nullptr);
    _exit(status.ok() ? 0 : 1);
  }

  void Reap() {
    int status = 0;
    for (pid_t pid = waitpid(-1, &status, WNOHANG); pid > 0; pid = waitpid(-1, &status, WNOHANG)) {
      for (Rank& rank : ranks_) {
        if (rank.pid == pid) Ended(rank, status);
      }
    }
  }

  void Ended(Rank& rank, int status) {
    rank.pid = -1;
    const bool well = WIFEXITED(status) && WEXITSTATUS(status) == 0;
    const std::string how = WIFSIGNALED(status) ? fmt::format("by signal {}", WTERMSIG(status))
                                                : fmt::format("with status {}", WEXITSTATUS(status));
    const int number = rank.options.group.rank;
    if (ending_) {
      if (!well && outcome_.ok()) outcome_ = Internal("rank {} ended {}", number, how);
      return;
    }
    if (rank.first_run && WIFEXITED(status) && !well) {
      // What it cannot do now it could not do later.
      outcome_ = Internal("rank {} cannot start", number);
      EndAll();
      return;
    }
    rank.first_run = false;
    if (SteadyClock::now() - rank.started > kCalm) rank.backoff = kBackoffMin;
    rank.start_at = SteadyClock::now() + rank.backoff;
    LogWarning("rank {} ended {}; it is started again in {:.1f} s", number, how,
               std::chrono::duration<double>(rank.backoff).count());
    rank.backoff = std::min<SteadyClock::duration>(2 * rank.backoff, kBackoffMax);
  }

  std::vector<Rank> ranks_;
  const Serve& serve_;
  const std::vector<int> cpus_;
  sigset_t signals_{};
  sigset_t before_{};
  bool ending_ = false;
  Status outcome_;
};

}  // namespace

Status RunRanks(const WorkerCommandOptions& options,
                const std::function<Status(const WorkerCommandOptions& rank)>& serve) {
  MR_RETURN_IF_ERROR(ConfigureLog(options.log));
  std::string directory = options.group.directory;
  if (directory.empty()) directory = "/dev/shm/" + RandomName("millrace-");
  std::vector<Rank> ranks(static_cast<size_t>(options.group.ranks));
  for (int i = 0; i < options.group.ranks; ++i) {
    WorkerCommandOptions& rank = ranks[static_cast<size_t>(i)].options;
    rank = options;
    rank.group.rank = i;
    rank.group.directory = directory;
    MR_ASSIGN_OR_RETURN(rank.listen, PortOf(options.listen, i));
    MR_ASSIGN_OR_RETURN(rank.metrics_listen, PortOf(options.metrics_listen, i));
    for (std::string& rail : rank.rails) {
      const StatusOr<HostPort> parsed = ParseHostPort(rail);
      if (parsed.ok() && parsed->port != 0) {
        MR_ASSIGN_OR_RETURN(rail, PortOf(rail, i));
      }
    }
  }
  const Status status = Ranks(std::move(ranks), serve).Run();
  if (options.group.directory.empty()) {
    std::error_code error;
    std::filesystem::remove_all(directory, error);
  }
  return status;
}

StatusOr<std::vector<HostPort>> GroupPeers(const GroupOptions& options) {
  if (options.rank < 0) return InvalidArgument("--group-peers needs --rank: which of them this is");
  if (!options.directory.empty())
    return InvalidArgument("--group-directory is for ranks of one host, --group-peers for several");
  std::vector<HostPort> peers;
  for (const std::string& address : options.peers) {
    StatusOr<HostPort> parsed = ParseHostPort(address);
    if (!parsed.ok() || parsed->port == 0)
      return InvalidArgument("--group-peers {}: not HOST:PORT with a port that the others can dial", address);
    peers.push_back(*std::move(parsed));
  }
  const auto ranks = static_cast<size_t>(options.ranks);
  if (peers.size() == 1) {
    const std::string leader = peers.front().host;
    const size_t label = std::min(leader.find('.'), leader.size());
    for (size_t rank = 1; rank < ranks; ++rank) {
      peers.push_back(
          {fmt::format("{}-{}{}", leader.substr(0, label), rank, leader.substr(label)), peers.front().port});
    }
  }
  if (peers.size() != ranks)
    return InvalidArgument("--group-peers: {} addresses for --ranks {}", peers.size(), ranks);
  return peers;
}

}  // namespace millrace::server
