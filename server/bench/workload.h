#pragma once
// What a load test asks, and when: a pure function of options and seed, so that two servers can be asked the
// same.

#include <cstdint>
#include <optional>
#include <random>
#include <string>
#include <vector>

#include "base/status.h"

namespace millrace::server {

// A whole number drawn uniformly from [low, high].
struct IntRange {
  int32_t low = 0;
  int32_t high = 0;
};
// "128" or "64:256", both >= min; errors name `flag`.
StatusOr<IntRange> ParseIntRange(const std::string& flag, const std::string& text, int32_t min);

// Text of about `tokens` tokens that depends on the seed alone: equal seeds, equal text, so equal leading
// parts are a shared prefix.
struct PromptPart {
  uint64_t seed = 0;
  int32_t tokens = 0;
};

// What one turn adds to its conversation. Earlier turns and the answers to them come before it.
struct PlannedTurn {
  std::vector<PromptPart> parts;
  int32_t output_tokens = 0;
};

struct PlannedSession {
  double at = 0;  // seconds after the start when the first turn is due; 0 throughout in a closed loop
  std::vector<PlannedTurn> turns;
};

struct WorkloadOptions {
  enum class Arrival { kRate, kUsers, kTrace };
  Arrival arrival = Arrival::kUsers;
  double rate = 0;     // kRate: sessions per second at the start
  double ramp_to = 0;  // kRate: sessions per second after ramp_seconds; used when ramp_seconds > 0
  double ramp_seconds = 0;
  // kRate: shape of the gamma distribution of the intervals: 1 = Poisson, below = bursts, infinite =
  // constant.
  double burstiness = 1;
  std::string trace;       // kTrace: JSON lines, see ReadTrace
  double trace_speed = 1;  // kTrace: 2 = twice as fast
  IntRange input_tokens{128, 128};
  IntRange output_tokens{64, 64};
  IntRange turns{1, 1};
  int32_t prefix_pools = 0;   // > 0: every conversation begins with one of so many texts
  int32_t prefix_tokens = 0;  // of each of them
  uint64_t seed = 1;
};

// A trace: one JSON object a line, either Mooncake's {"timestamp": ms, "input_length", "output_length",
// "hash_ids"} (512 tokens a hash id, equal ids are equal text) or {"at": seconds, "input_tokens",
// "output_tokens"}. Times must not go back. Errors name the file, the line and the field.
StatusOr<std::vector<PlannedSession>> ReadTrace(const std::string& path, double speed, uint64_t seed);

// One thread. Next() gives the sessions in order; nullopt at the end of a trace, otherwise never.
class Workload {
 public:
  static StatusOr<Workload> Create(const WorkloadOptions& options);
  std::optional<PlannedSession> Next();

 private:
  explicit Workload(const WorkloadOptions& options) : options_(options), random_(options.seed) {}
  double NextArrival();
  int32_t Draw(const IntRange& range);

  WorkloadOptions options_;
  std::mt19937_64 random_;
  uint64_t num_sessions_ = 0;
  double arrivals_due_ = 0;  // integral of the rate up to the last arrival
  std::vector<PlannedSession> trace_;
};

// Time at which the integral of a rate that goes linearly from `rate` to `ramp_to` in `ramp_seconds`, and
// stays there, reaches `count`.
double TimeOfArrival(double count, double rate, double ramp_to, double ramp_seconds);

// Words, separated by blanks, as many as asked, from the part's seed.
std::string PromptText(uint64_t seed, int32_t words);

}  // namespace millrace::server
