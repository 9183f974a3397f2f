// transfer-bench: a target that lends memory, an initiator that moves blocks to and from it, or both in this
// process.
#include <signal.h>
#include <unistd.h>

#include <charconv>

#include "base/log.h"
#include "server/cli/commands.h"
#include "server/cli/transfer_bench_report.h"
#include "server/cli/transfer_bench_target.h"

namespace millrace::server {
namespace {

StatusOr<size_t> Size(const char* flag, const std::string& text) {
  const auto bytes = ParseBytes(text);
  if (!bytes.ok()) return Annotate(bytes.status(), flag);
  return *bytes;
}

StatusOr<BenchFault> ParseFault(const std::string& text) {
  BenchFault fault;
  const size_t colon = text.find(':');
  const char* const end = text.data() + (colon == std::string::npos ? 0 : colon);
  const auto [at, error] = std::from_chars(text.data(), end, fault.at_seconds);
  if (colon == std::string::npos || error != std::errc() || at != end || fault.at_seconds < 0)
    return InvalidArgument("--fault '{}': write SECONDS:COMMAND", text);
  fault.command = text.substr(colon + 1);
  return fault;
}

transfer::Options EngineOptions(const TransferBenchOptions& options) {
  transfer::Options engine;
  engine.listen = options.rails;
  engine.include = options.include;
  engine.exclude = options.exclude;
  engine.kinds = options.kinds;
  return engine;
}

// What the flags say, each combination of sizes, batches and threads one row.
StatusOr<std::vector<BenchRow>> MakeRows(const TransferBenchOptions& options) {
  BenchRow row;
  row.load.op = options.op == "read"    ? BenchLoad::Op::kRead
                : options.op == "mixed" ? BenchLoad::Op::kMixed
                                        : BenchLoad::Op::kWrite;
  row.load.depth = options.depth;
  row.load.check = options.check;
  row.load.scatter = options.scatter;
  row.load.prepare = options.prepare;
  row.load.reconnect = options.reconnect;
  MR_ASSIGN_OR_RETURN(row.load.memory_bytes, Size("--memory", options.memory));
  row.warmup_seconds = options.warmup;
  row.seconds = options.seconds;
  row.timeline_ms = options.timeline_ms;
  if (!options.background.empty()) {
    MR_ASSIGN_OR_RETURN(row.background_block_bytes, Size("--background", options.background));
  }
  for (const std::string& text : options.faults) {
    MR_ASSIGN_OR_RETURN(BenchFault fault, ParseFault(text));
    if (fault.at_seconds >= options.seconds)
      return InvalidArgument("--fault '{}' comes after the {} s of --seconds", text, options.seconds);
    row.faults.push_back(std::move(fault));
  }
  std::vector<BenchRow> rows;
  for (const std::string& text : options.blocks) {
    MR_ASSIGN_OR_RETURN(row.load.block_bytes, Size("--block", text));
    if (row.load.block_bytes == 0 || row.load.block_bytes % 8 != 0)
      return InvalidArgument("--block {}: a multiple of 8 bytes is expected", text);
    for (const int batch : options.batches) {
      for (const int threads : options.threads) {
        row.load.batch = batch;
        row.threads = threads;
        rows.push_back(row);
      }
    }
  }
  return rows;
}

// One line that grows on a terminal, a line each second elsewhere.
class Progress {
 public:
  explicit Progress(const BenchRow& row)
      : terminal_(isatty(STDERR_FILENO) != 0),
        label_(fmt::format("{} {} x {}, {} threads", OpName(row.load.op), SizeText(row.load.block_bytes),
                           row.load.batch, row.threads)),
        total_seconds_(row.seconds) {}
  ~Progress() {
    if (terminal_) fmt::print(stderr, "\r\x1b[K");
  }
  void operator()(double seconds, uint64_t bytes) {
    if (seconds < next_) return;
    next_ = seconds + (terminal_ ? 0.2 : 1.0);
    fmt::print(stderr, "{}{}: {:.1f} of {:.1f} s, {:.3f} GB/s{}", terminal_ ? "\r" : "", label_, seconds,
               total_seconds_, static_cast<double>(bytes) / seconds / 1e9, terminal_ ? "\x1b[K" : "\n");
  }

 private:
  const bool terminal_;
  const std::string label_;
  const double total_seconds_;
  double next_ = 0.2;
};

Status RunInitiator(const TransferBenchOptions& options, const HostPort& target, bool one_process) {
  MR_ASSIGN_OR_RETURN(const std::vector<BenchRow> rows, MakeRows(options));
  transfer::Options transfer_options = EngineOptions(options);
  transfer_options.name = "bench-initiator";
  MR_ASSIGN_OR_RETURN(const auto transfer, transfer::Transfer::Create(transfer_options));
  OrderedJson json{{"version", MILLRACE_VERSION}, {"rows", OrderedJson::array()}};
  if (!options.json) fmt::print("{}", BenchTableHead());
  uint64_t errors = 0;
  uint64_t wrong_bytes = 0;
  for (const BenchRow& row : rows) {
    Progress progress(row);
    MR_ASSIGN_OR_RETURN(const BenchResult result,
                        RunBenchRow(transfer.get(), target, row, std::ref(progress)));
    for (const auto& [message, count] : result.tally.errors) errors += count;
    for (const auto& [message, count] : result.background.errors) errors += count;
    wrong_bytes += result.tally.wrong_bytes;
    if (options.json) {
      json["rows"].push_back(BenchJson(result, one_process));
    } else {
      fmt::print("{}", BenchTableRow(result, one_process));
      std::fflush(stdout);
    }
  }
  if (options.json) fmt::print("{}\n", DumpJson(json));
  if (wrong_bytes > 0) return DataLoss("{} bytes arrived wrong", wrong_bytes);
  if (errors > 0) return Unavailable("{} transfers failed", errors);
  return OkStatus();
}

Status Run(const TransferBenchOptions& options) {
  MR_RETURN_IF_ERROR(ConfigureLog(options.log));
  signal(SIGPIPE, SIG_IGN);
  if (!options.connect.empty()) {
    const auto target = ParseHostPort(options.connect);
    if (!target.ok()) return Annotate(target.status(), "--connect");
    return RunInitiator(options, *target, /*one_process=*/false);
  }
  // Blocked here and in every thread started from here on, so that sigwait gets them.
  sigset_t ends{};
  sigemptyset(&ends);
  if (options.target) {
    sigaddset(&ends, SIGINT);
    sigaddset(&ends, SIGTERM);
    pthread_sigmask(SIG_BLOCK, &ends, nullptr);
  }
  BenchTargetOptions target_options;
  target_options.listen = options.target ? options.listen : "127.0.0.1:0";
  target_options.transfer = EngineOptions(options);
  MR_ASSIGN_OR_RETURN(target_options.memory_bytes_max, Size("--memory-max", options.memory_max));
  MR_ASSIGN_OR_RETURN(const auto target, BenchTarget::Create(target_options));
  if (!options.target) return RunInitiator(options, target->address(), /*one_process=*/true);
  fmt::print("Millrace transfer-bench target on {}\n", target->address().ToString());
  std::fflush(stdout);
  int number = 0;
  sigwait(&ends, &number);
  return OkStatus();
}

}  // namespace

int RunTransferBench(const TransferBenchOptions& options) {
  const Status status = Run(options);
  if (status.ok()) return 0;
  fmt::print(stderr, "millrace transfer-bench: {}\n", Message(status));
  return 1;
}

}  // namespace millrace::server
