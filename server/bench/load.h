#pragma once
// Sends one workload to one server and keeps what came back. One thread, one io_context: thousands of
// streams.

#include <functional>
#include <string>
#include <vector>

#include "base/json.h"
#include "base/latency_histogram.h"
#include "base/net.h"
#include "server/bench/answer_meter.h"
#include "server/bench/server_phases.h"
#include "server/bench/workload.h"

namespace millrace::server {

struct LoadTarget {
  HostPort address;
  std::string path_prefix;  // before /v1, without a final '/'
  bool grpc = false;        // millrace.v1.Chat instead of HTTP
  bool tls = false;  // https, grpcs: its certificate must be valid for the address's host, unless `insecure`
  bool insecure = false;
  std::string ca_file;  // certificates to trust instead of the system's; empty: the system's
  std::string api_key;  // empty: none is sent
  std::string model;    // empty: the first one that the server lists
  bool chat = true;     // /v1/chat/completions, else /v1/completions
  bool stream = true;
};
// http[s]://host[:port][/prefix] or grpc[s]://host:port
StatusOr<LoadTarget> ParseTarget(const std::string& url);

// How this server's tokenizer counts our words, from two short requests.
struct Calibration {
  double tokens_per_word = 1;
  double tokens_around = 0;  // template
  bool counted = false;      // false: the server gives no usage, and words are taken for tokens
};

struct LoadOptions {
  LoadTarget target;
  WorkloadOptions workload;
  Calibration calibration;
  int32_t users = 1;            // closed loop: so many conversations at once
  double think_seconds = 0;     // between an answer and the next turn, or the user's next conversation
  int64_t requests_max = 0;     // 0 = no bound; else no more than so many are started
  double duration_seconds = 0;  // 0 = no bound; else none is due later than this
  double warmup_seconds = 0;    // requests due earlier are sent, but not counted
  double grace_seconds = 30;    // how long running ones may go on after the last was started
  double request_timeout_seconds = 600;
  int32_t connections_max = 0;  // 0 = no bound; else the rest waits here, and that wait counts
  double temperature = 0;
  bool ignore_eos = true;                          // and min_tokens: answers are as long as planned
  OrderedJson extra_body = OrderedJson::object();  // added to every request
};

// Whether the client itself kept up.
struct ClientHealth {
  LatencyHistogram timer_lag;  // how late a timer ran that was due every 10 ms
  LatencyHistogram send_lag;   // from when a request was due to its first byte on the wire
  double cpu_seconds = 0;      // of this thread
  double wall_seconds = 0;
  int64_t connections = 0;  // opened
  int32_t in_flight_max = 0;
};

struct LoadProgress {
  double seconds = 0;
  int64_t started = 0;
  int32_t in_flight = 0;
  int64_t served = 0;
  int64_t failed = 0;
  int64_t tokens = 0;
  double ttft_p50 = 0, ttft_p99 = 0, itl_p50 = 0, itl_p99 = 0;  // seconds, since the start
};

struct LoadResult {
  std::vector<RequestResult> requests;  // in the order in which they ended
  TimePoint start;
  ClientHealth client;
  bool interrupted = false;
};

// Sets the target's model if it has none, and twice for one token. Errors say what to mend: address, key,
// model.
StatusOr<Calibration> Calibrate(LoadTarget* target);

// The totals of the server's phases at this moment, from `metrics_url` or, when that is empty, the target's
// own /metrics; empty when there are none to be had.
PhaseTotals ReadPhases(const LoadTarget& target, const std::string& metrics_url);

// `progress` is called about every second. `interrupted` is looked at every 10 ms and ends the run early,
// with what there is. An error only when nothing could be sent at all: a bad trace, a name without an
// address.
StatusOr<LoadResult> RunLoad(const LoadOptions& options,
                             const std::function<void(const LoadProgress&)>& progress,
                             const std::function<bool()>& interrupted);

}  // namespace millrace::server
