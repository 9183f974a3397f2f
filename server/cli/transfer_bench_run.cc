#include "server/cli/transfer_bench_run.h"

#include <spawn.h>
#include <sys/wait.h>

#include <algorithm>

#include "base/check.h"
#include "base/random.h"
#include "base/thread.h"

extern char** environ;

namespace millrace::server {
namespace {

constexpr Duration kTick = std::chrono::milliseconds(20);

TimePoint Now() { return Clock::System().Now(); }

Duration FromSeconds(double seconds) {
  return std::chrono::duration_cast<Duration>(std::chrono::duration<double>(seconds));
}

int RunShell(const std::string& command) {
  std::string shell = "/bin/sh";
  std::string flag = "-c";
  std::string text = command;
  char* const arguments[] = {shell.data(), flag.data(), text.data(), nullptr};
  pid_t child = 0;
  if (posix_spawn(&child, shell.c_str(), nullptr, nullptr, arguments, environ) != 0) return -1;
  int status = 0;
  if (waitpid(child, &status, 0) != child) return -1;
  return WIFEXITED(status) ? WEXITSTATUS(status) : -1;
}

// Runs faults at their times on a thread of its own.
class FaultSchedule {
 public:
  FaultSchedule(std::vector<BenchFault> faults, const BenchWindow* window)
      : faults_(std::move(faults)), window_(window) {
    std::stable_sort(faults_.begin(), faults_.end(),
                     [](const auto& a, const auto& b) { return a.at_seconds < b.at_seconds; });
    thread_ = std::thread([this] { Run(); });
  }
  ~FaultSchedule() {
    if (thread_.joinable()) thread_.join();
  }
  // Waits for the last command.
  std::vector<BenchFaultRun> Finish() {
    thread_.join();
    return std::move(runs_);
  }

 private:
  void Run() {
    SetThreadName("bench-faults");
    for (const BenchFault& fault : faults_) {
      std::this_thread::sleep_until(window_->start + FromSeconds(fault.at_seconds));
      if (window_->stopping) return;
      BenchFaultRun run{fault, Seconds(Now() - window_->start), 0, 0};
      run.exit_code = RunShell(fault.command);
      run.ended_seconds = Seconds(Now() - window_->start);
      runs_.push_back(std::move(run));
    }
  }

  std::vector<BenchFault> faults_;
  const BenchWindow* const window_;
  std::vector<BenchFaultRun> runs_;
  std::thread thread_;
};

// Paths of one local and one remote rail together, as differences to what they had carried at the start.
class RailCounters {
 public:
  explicit RailCounters(const transfer::Snapshot& start) { base_ = Sum(start); }

  std::vector<BenchRail> Since(const transfer::Snapshot& now) const {
    std::vector<BenchRail> rails = Sum(now);
    for (BenchRail& rail : rails) {
      for (const BenchRail& before : base_) {
        if (before.kind != rail.kind || before.local != rail.local || before.remote != rail.remote) continue;
        rail.bytes -= std::min(rail.bytes, before.bytes);
        rail.slices -= std::min(rail.slices, before.slices);
        rail.slices_resent -= std::min(rail.slices_resent, before.slices_resent);
        rail.slices_hedged -= std::min(rail.slices_hedged, before.slices_hedged);
        rail.trips -= std::min(rail.trips, before.trips);
      }
    }
    return rails;
  }

 private:
  static std::vector<BenchRail> Sum(const transfer::Snapshot& snapshot) {
    std::vector<BenchRail> rails;
    for (const transfer::PathSnapshot& path : snapshot.paths) {
      if (path.kind == "control") continue;
      auto found = std::find_if(rails.begin(), rails.end(), [&path](const BenchRail& rail) {
        return rail.kind == path.kind && rail.local == path.local_rail && rail.remote == path.remote_rail;
      });
      if (found == rails.end()) {
        rails.push_back({path.kind, path.local_rail, path.remote_rail, path.state});
        found = std::prev(rails.end());
      }
      found->bytes += path.bytes_done;
      found->slices += path.slices_done;
      found->slices_resent += path.slices_resent;
      found->slices_hedged += path.slices_hedged;
      found->trips += path.trips;
      found->bytes_per_second += path.bytes_per_second;
      found->delay_seconds = std::max(found->delay_seconds, path.delay_seconds);
    }
    return rails;
  }

  std::vector<BenchRail> base_;
};

struct TargetUsage {
  double cpu_seconds = 0;
  uint64_t slices_refused = 0;
};

// A killed target's usage is unknown: 0.
TargetUsage AskUsage(const HostPort& target) {
  auto control = BenchControl::Connect(target);
  if (!control.ok()) return {};
  const auto answer = control->Ask({{"usage", true}});
  if (!answer.ok()) return {};
  const auto cpu = GetNumber(*answer, "cpu_seconds");
  const auto refused = GetInt(*answer, "slices_refused");
  if (!cpu.ok() || !refused.ok()) return {};
  return {cpu->value_or(0), static_cast<uint64_t>(refused->value_or(0))};
}

}  // namespace

StatusOr<BenchResult> RunBenchRow(transfer::Transfer* transfer, const HostPort& target, const BenchRow& row,
                                  const std::function<void(double, uint64_t)>& progress) {
  BenchWindow window;
  if (row.timeline_ms > 0) {
    window.bucket = FromSeconds(row.timeline_ms / 1e3);
    window.timeline =
        std::vector<std::atomic<uint64_t>>(static_cast<size_t>(row.seconds * 1e3 / row.timeline_ms) + 1);
  }
  const uint64_t seed = RandomId() >> 2;  // fits a JSON integer
  std::vector<std::unique_ptr<BenchThread>> threads;
  const auto add = [&](const BenchLoad& load, BenchWindow* counted) {
    threads.push_back(std::make_unique<BenchThread>(transfer, target, load, counted, seed + threads.size()));
    return threads.back()->Connect();
  };
  for (int i = 0; i < row.threads; ++i) MR_RETURN_IF_ERROR(add(row.load, &window));
  BenchWindow background_window;  // its own, so that bulk bytes do not count as the row's
  if (row.background_block_bytes > 0) {
    BenchLoad load;
    load.block_bytes = row.background_block_bytes;
    load.priority = row.load.priority - 1;
    MR_RETURN_IF_ERROR(add(load, &background_window));
  }

  for (const auto& thread : threads) thread->Start();
  std::this_thread::sleep_for(FromSeconds(row.warmup_seconds));
  BenchResult result;
  result.row = row;
  const RailCounters counters(transfer->TakeSnapshot());
  const TargetUsage usage_before = AskUsage(target);
  const double cpu_before = ProcessCpuSeconds();
  window.start = background_window.start = Now();
  window.measuring.store(true, std::memory_order_release);
  background_window.measuring.store(true, std::memory_order_release);

  FaultSchedule faults(row.faults, &window);
  const TimePoint end = window.start + FromSeconds(row.seconds);
  for (TimePoint next = window.start + kTick; next < end; next += kTick) {
    std::this_thread::sleep_until(next);
    const double seconds = Seconds(Now() - window.start);
    progress(seconds, window.bytes);
    if (row.timeline_ms <= 0) continue;
    BenchRailSample sample{seconds, {}};
    for (const BenchRail& rail : counters.Since(transfer->TakeSnapshot())) sample.bytes.push_back(rail.bytes);
    result.rail_samples.push_back(std::move(sample));
  }
  std::this_thread::sleep_until(end);
  window.stopping = background_window.stopping = true;
  result.seconds = Seconds(Now() - window.start);
  result.cpu_seconds = ProcessCpuSeconds() - cpu_before;
  const TargetUsage usage_after = AskUsage(target);
  result.target_cpu_seconds = std::max(0.0, usage_after.cpu_seconds - usage_before.cpu_seconds);
  result.slices_refused = usage_after.slices_refused;
  result.rails = counters.Since(transfer->TakeSnapshot());

  const auto rows = static_cast<size_t>(row.threads);
  for (size_t i = 0; i < threads.size(); ++i)
    (i < rows ? result.tally : result.background).Merge(threads[i]->Finish());
  result.faults = faults.Finish();
  for (const auto& bucket : window.timeline) result.timeline.push_back(bucket);
  return result;
}

}  // namespace millrace::server
