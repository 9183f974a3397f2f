#pragma once
// One random schedule: a sender and a receiver joined by one to four rails, tickets that are granted, written
// to or read from (the same places again and again), aborted and closed, faults for a while, then none. In
// some the rails are severed until the sender gives its peer up, opens it again under the same epoch, and
// goes on. Checkers watch throughout.

#include <string>

#include "tests/sim/model.h"

namespace millrace::sim {

struct Outcome {
  std::string violation;  // empty: none
  uint64_t steps = 0;
  int requests_ok = 0;
  int reads_ok = 0;         // of these
  int requests_failed = 0;  // cancelled, refused after their ticket was closed, or lost with their peer
  uint64_t reopened = 0;    // peers that were lost, though their process lives, and opened again
  uint64_t trips = 0;
  uint64_t slices_hedged = 0;
  uint64_t slices_superseded = 0;
};

// The same seed gives the same schedule and the same outcome.
Outcome RunSchedule(uint64_t seed, Bug bug = Bug::kNone);

}  // namespace millrace::sim
