#pragma once
// Who serves a request: pure functions over snapshots of the workers. No clock, no I/O.

#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "base/clock.h"
#include "base/status.h"
#include "server/router/speed.h"

namespace millrace::server {

enum class WorkerRole { kPrefill, kDecode, kBoth };

// One path of a worker's transfer engine, as it said it last; see transfer.h.
struct WorkerPath {
  std::string kind;
  std::string local_rail;
  std::string remote_rail;
  std::string state;
  std::string reason;
  uint64_t bytes_done = 0;
  uint64_t bytes_in_flight = 0;
  uint64_t trips = 0;
  double bytes_per_second = 0;
  double delay_seconds = 0;
};

// How a prefill worker reaches one decode worker.
struct WorkerLink {
  uint64_t epoch = 0;  // of the decode worker
  int32_t paths = 0;
  int32_t paths_up = 0;
};

// Of a worker that is one rank of an expert group.
struct WorkerGroup {
  int32_t rank = 0;
  int32_t ranks = 0;
  uint32_t epoch = 0;
  uint32_t alive = 0;           // bit r: rank r
  std::vector<uint32_t> ports;  // of the ranks, on this worker's host; 0: not known
  int32_t experts_held = 0;
  double imbalance = 0;  // 0 = not measured
  std::vector<float> expert_load;
  std::vector<float> rank_load;
};

// What the watch stream of one worker last said, plus whether that stream is alive and what became of
// requests.
struct WorkerSnapshot {
  std::string address;  // host:port, numeric
  WorkerRole role = WorkerRole::kBoth;
  bool connected = false;  // the watch stream is alive
  bool ready = false;
  bool stalled = false;           // it says of itself that it computes no further
  bool avoid = false;             // it failed requests lately (WorkerHealth)
  Duration silent = Duration(0);  // since it last said anything
  uint64_t epoch = 0;
  std::string model_name;
  std::string model_digest;
  uint64_t layout_hash = 0;
  uint32_t protocol_version = 0;
  int32_t pages_total = 0;
  int32_t pages_free = 0;
  int32_t waiting = 0;
  int32_t running = 0;
  int32_t context_max = 0;
  Measured prefill_rate;            // tokens per second
  Measured token_gap;               // seconds between two tokens of an answer
  std::vector<std::string> avoids;  // decode: prefill workers that failed it lately
  std::vector<WorkerLink> links;    // prefill: decode workers that it has written to
  int32_t cached_tokens = 0;        // of the prompt that is to be routed: in the worker's prefix cache
  int32_t open_tickets = 0;
  int32_t draining_tickets = 0;
  int32_t transfers = 0;  // requests of its transfer engine that are under way
  // Shared: every routed request copies the snapshots. Null before the first state.
  std::shared_ptr<const std::vector<WorkerPath>> paths;
  std::shared_ptr<const WorkerGroup> group;  // null: it is a worker by itself
};

struct RouteRequest {
  int32_t prompt_tokens = 0;
  // A decode worker that lacks the KV of no more than this many tokens of the prompt prefills by itself.
  int32_t local_prefill_tokens_max = 0;
  std::vector<std::string> exclude = {};  // addresses that failed this request already
  std::string model_digest = {};  // an answer that has begun goes on with the same weights; empty: any
};

struct Route {
  std::string decode;
  std::vector<std::string> prefill;  // in order of preference; empty: decode prefills
};

// Picks the decode worker with the least predicted load, where a prompt whose KV is there in full counts for
// as much as two sequences less, and a worker whose answers come at less than half of its peers' pace has as
// many times more to do. Orders the prefill workers that are compatible with it (protocol version, model
// digest, KV layout hash) by predicted time to first token: (tokens queued + prompt tokens that are not
// cached there) over the measured rate, longer as paths to the decode worker are down. Measured speeds count
// as far as they are to be believed (speed.h). Who failed lately, has not been heard of for a while, or
// reaches the decode worker on no path comes after all others, but before nobody. Ties go to the lower
// address, so equal snapshots give equal routes. Unavailable, saying why ("no decode worker is ready: 2
// known, 0 connected"), when nobody can serve.
StatusOr<Route> PickRoute(std::span<const WorkerSnapshot> workers, const RouteRequest& request);

}  // namespace millrace::server
