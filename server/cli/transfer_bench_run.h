#pragma once
// Runs one row of transfer-bench: threads, the measured window, faults at their times, and what rails
// carried.

#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "server/cli/transfer_bench_load.h"

namespace millrace::server {

// A command for /bin/sh at a time of the measured window: how rails are broken and healed.
struct BenchFault {
  double at_seconds = 0;
  std::string command;
};

struct BenchRow {
  BenchLoad load;
  int threads = 1;
  double warmup_seconds = 0.5;
  double seconds = 3;
  size_t background_block_bytes = 0;  // 0: none; else one more thread of bulk writes at a lower priority
  double timeline_ms = 0;             // 0: none
  std::vector<BenchFault> faults;
};

struct BenchFaultRun {
  BenchFault fault;
  double started_seconds = 0;
  double ended_seconds = 0;
  int exit_code = 0;
};

struct BenchRail {
  std::string kind;
  std::string local;
  std::string remote;
  std::string state;
  uint64_t bytes = 0;  // within the window
  uint64_t slices = 0;
  uint64_t slices_resent = 0;
  uint64_t slices_hedged = 0;
  uint64_t trips = 0;
  double bytes_per_second = 0;  // as the engine measures it, over busy time; summed over connections
  double delay_seconds = 0;
};

// Bytes that each rail had carried at a time, in the order of BenchResult::rails; for the timeline.
struct BenchRailSample {
  double seconds = 0;
  std::vector<uint64_t> bytes;
};

struct BenchResult {
  BenchRow row;
  double seconds = 0;  // of the window, measured
  BenchTally tally;
  BenchTally background;
  double cpu_seconds = 0;         // of this process, within the window
  double target_cpu_seconds = 0;  // of the target's; equal when both are one process
  uint64_t slices_refused = 0;    // at the target, since it started
  std::vector<BenchRail> rails;
  std::vector<BenchRailSample> rail_samples;
  std::vector<uint64_t> timeline;  // bytes per bucket
  std::vector<BenchFaultRun> faults;

  double bytes_per_second() const { return static_cast<double>(tally.bytes) / seconds; }
};

// `progress` gets (seconds, bytes) now and then. Errors are those of setting up; what happens to transfers
// is in the result.
StatusOr<BenchResult> RunBenchRow(transfer::Transfer* transfer, const HostPort& target, const BenchRow& row,
                                  const std::function<void(double, uint64_t)>& progress);

}  // namespace millrace::server
