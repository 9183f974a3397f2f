#include "server/cli/transfer_bench_report.h"

#include <algorithm>

namespace millrace::server {
namespace {

double Microseconds(uint64_t nanoseconds) { return static_cast<double>(nanoseconds) / 1e3; }

double PerGigabyte(double cpu_seconds, const BenchResult& result) {
  const double gigabytes = static_cast<double>(result.tally.bytes + result.background.bytes) / 1e9;
  return gigabytes > 0 ? cpu_seconds / gigabytes : 0;
}

uint64_t RailBytes(const BenchResult& result) {
  uint64_t bytes = 0;
  for (const BenchRail& rail : result.rails) bytes += rail.bytes;
  return bytes;
}

double Share(const BenchRail& rail, uint64_t all) {
  return all == 0 ? 0 : static_cast<double>(rail.bytes) / static_cast<double>(all);
}

OrderedJson HistogramJson(const LatencyHistogram& histogram) {
  OrderedJson json;
  json["count"] = histogram.count();
  for (const double percent : {50.0, 90.0, 99.0, 99.9})
    json[fmt::format("p{:g}", percent)] = Microseconds(histogram.Percentile(percent));
  json["max"] = Microseconds(histogram.Percentile(100));
  return json;
}

}  // namespace

std::string SizeText(size_t bytes) {
  if (bytes >= 1 << 20 && bytes % (1 << 20) == 0) return fmt::format("{}MiB", bytes >> 20);
  if (bytes >= 1 << 10 && bytes % (1 << 10) == 0) return fmt::format("{}KiB", bytes >> 10);
  return fmt::format("{}", bytes);
}

const char* OpName(BenchLoad::Op op) {
  static constexpr const char* kNames[] = {"write", "read", "mixed"};
  return kNames[static_cast<int>(op)];
}

std::string BenchTableHead() {
  return fmt::format("{:<6}{:>8}{:>7}{:>5}{:>6}{:>9}{:>13}{:>10}{:>10}{:>10}{:>10}{:>10}{:>15}\n", "op",
                     "block", "batch", "thr", "depth", "GB/s", "transfers/s", "P50 us", "P90", "P99", "P99.9",
                     "max", "CPU s/GB");
}

std::string BenchTableRow(const BenchResult& result, bool one_process) {
  const BenchLoad& load = result.row.load;
  const LatencyHistogram& latency = result.tally.latency;
  const double initiator = PerGigabyte(result.cpu_seconds, result);
  const std::string cpu =
      one_process ? fmt::format("{:.3f}", initiator)
                  : fmt::format("{:.3f} + {:.3f}", initiator, PerGigabyte(result.target_cpu_seconds, result));
  std::string text = fmt::format(
      "{:<6}{:>8}{:>7}{:>5}{:>6}{:>9.3f}{:>13.0f}{:>10.1f}{:>10.1f}{:>10.1f}{:>10.1f}{:>10.1f}{:>15}\n",
      OpName(load.op), SizeText(load.block_bytes), load.batch, result.row.threads, load.depth,
      result.bytes_per_second() / 1e9, static_cast<double>(result.tally.transfers) / result.seconds,
      Microseconds(latency.Percentile(50)), Microseconds(latency.Percentile(90)),
      Microseconds(latency.Percentile(99)), Microseconds(latency.Percentile(99.9)),
      Microseconds(latency.Percentile(100)), cpu);
  const uint64_t all = RailBytes(result);
  for (const BenchRail& rail : result.rails) {
    text += fmt::format("  {} {} -> {}: {:.1f} %, {} slices, {} sent again, {} hedged, {}\n", rail.kind,
                        rail.local, rail.remote, Share(rail, all) * 100, rail.slices, rail.slices_resent,
                        rail.slices_hedged, rail.state);
  }
  if (result.background.bytes > 0) {
    text +=
        fmt::format("  under bulk writes of {}: {:.3f} GB/s\n", SizeText(result.row.background_block_bytes),
                    static_cast<double>(result.background.bytes) / result.seconds / 1e9);
  }
  if (load.check) {
    text +=
        fmt::format("  checked {} bytes: {} wrong\n", result.tally.checked_bytes, result.tally.wrong_bytes);
  }
  for (const BenchFaultRun& run : result.faults) {
    text += fmt::format("  {:.3f} s: {} (exit {})\n", run.started_seconds, run.fault.command, run.exit_code);
  }
  for (const BenchLoss& loss : result.tally.losses) {
    text += fmt::format("  peer lost at {:.3f} s, {}\n", loss.lost_seconds,
                        loss.back_seconds > 0 ? fmt::format("found again at {:.3f} s", loss.back_seconds)
                                              : "not found again");
  }
  for (const auto* tally : {&result.tally, &result.background}) {
    for (const auto& [message, count] : tally->errors)
      text += fmt::format("  error, {} times: {}\n", count, message);
  }
  return text;
}

OrderedJson BenchJson(const BenchResult& result, bool one_process) {
  const BenchLoad& load = result.row.load;
  OrderedJson json;
  json["op"] = OpName(load.op);
  json["block_bytes"] = load.block_bytes;
  json["batch"] = load.batch;
  json["threads"] = result.row.threads;
  json["depth"] = load.depth;
  json["seconds"] = result.seconds;
  json["bytes"] = result.tally.bytes;
  json["transfers"] = result.tally.transfers;
  json["bytes_per_second"] = result.bytes_per_second();
  json["latency_us"] = HistogramJson(result.tally.latency);
  json["submit_us"] = HistogramJson(result.tally.submit);
  json["cpu_seconds"] = result.cpu_seconds;
  if (!one_process) json["target_cpu_seconds"] = result.target_cpu_seconds;
  json["checked_bytes"] = result.tally.checked_bytes;
  json["wrong_bytes"] = result.tally.wrong_bytes;
  json["slices_refused"] = result.slices_refused;
  json["errors"] = OrderedJson::object();
  for (const auto* tally : {&result.tally, &result.background}) {
    for (const auto& [message, count] : tally->errors) json["errors"][message] = count;
  }
  json["losses"] = OrderedJson::array();
  for (const BenchLoss& loss : result.tally.losses)
    json["losses"].push_back({{"lost_seconds", loss.lost_seconds}, {"back_seconds", loss.back_seconds}});
  const uint64_t all = RailBytes(result);
  json["rails"] = OrderedJson::array();
  for (const BenchRail& rail : result.rails) {
    json["rails"].push_back({{"kind", rail.kind},
                             {"local", rail.local},
                             {"remote", rail.remote},
                             {"state", rail.state},
                             {"bytes", rail.bytes},
                             {"share", Share(rail, all)},
                             {"slices", rail.slices},
                             {"slices_resent", rail.slices_resent},
                             {"slices_hedged", rail.slices_hedged},
                             {"trips", rail.trips},
                             {"bytes_per_second", rail.bytes_per_second},
                             {"delay_seconds", rail.delay_seconds}});
  }
  json["faults"] = OrderedJson::array();
  for (const BenchFaultRun& run : result.faults) {
    json["faults"].push_back({{"command", run.fault.command},
                              {"at_seconds", run.fault.at_seconds},
                              {"started_seconds", run.started_seconds},
                              {"ended_seconds", run.ended_seconds},
                              {"exit_code", run.exit_code}});
  }
  if (result.row.background_block_bytes > 0) {
    json["background"] = {
        {"block_bytes", result.row.background_block_bytes},
        {"bytes_per_second", static_cast<double>(result.background.bytes) / result.seconds}};
  }
  if (result.row.timeline_ms > 0) {
    json["timeline"] = {{"bucket_ms", result.row.timeline_ms}, {"bytes", result.timeline}};
    json["rail_samples"] = OrderedJson::array();
    for (const BenchRailSample& sample : result.rail_samples)
      json["rail_samples"].push_back({{"seconds", sample.seconds}, {"bytes", sample.bytes}});
  }
  return json;
}

}  // namespace millrace::server
