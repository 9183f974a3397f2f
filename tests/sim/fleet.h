#pragma once
// Many hosts at once: each sends to another over several rails while some of the rails swallow everything for
// a while. The same scheduler and ticket code as everywhere, one peer and one receiver for each host.

#include <string>
#include <vector>

#include "tests/sim/model.h"

namespace millrace::sim {

struct FleetPlan {
  int hosts = 64;
  int rails = 8;
  double bytes_per_second = 125e6;  // of each rail
  uint64_t seed = 1;
  double broken = 0.1;  // of all rails, from `begins` to `ends`
  Duration begins = std::chrono::milliseconds(100);
  Duration ends = std::chrono::milliseconds(250);
  Duration load_ends = std::chrono::milliseconds(500);  // what is under way then goes on to its end
  Duration bin = std::chrono::milliseconds(5);
};

struct FleetOutcome {
  std::string violation;  // empty: none
  uint64_t steps = 0;
  uint64_t requests = 0;  // done, all of them well
  uint64_t trips = 0;
  uint64_t hedged = 0;
  // Of what all rails that worked could carry: the least of any bin before the outage, from 50 ms after it
  // began until its end, and from 200 ms after its end until the load ends.
  double before = 0, during = 0, after = 0;
};

// Ends two seconds after the load. The same plan gives the same outcome.
FleetOutcome RunFleet(const FleetPlan& plan);

}  // namespace millrace::sim
