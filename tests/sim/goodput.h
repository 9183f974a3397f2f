#pragma once
// Goodput through an outage: the production scheduler against two that bind slices to rails when they are
// submitted.

#include <string>
#include <vector>

#include "tests/sim/model.h"

namespace millrace::sim {

enum class Policy { kLateBinding, kRoundRobin, kStaticSplit };
const char* Name(Policy policy);

struct OutagePlan {
  int rails = 4;
  double bytes_per_second = 1e9;  // of each
  Duration begins = std::chrono::milliseconds(200);
  Duration ends = std::chrono::milliseconds(600);
  Duration length = std::chrono::milliseconds(1000);
  Duration bin = std::chrono::milliseconds(5);
  double factor = 0;                            // of rail 0's rate in the outage; 0: it swallows everything
  uint64_t request_blocks = 256, requests = 4;  // always under way
  Duration trial_period = std::chrono::seconds(1);  // Options::trial_period
  // How long the two early binders wait for a silent rail: what a NIC's own retries take.
  Duration patience = std::chrono::milliseconds(500);
};

// Bytes of requests' slices that landed a second, for each bin, over one outage of rail 0.
std::vector<double> GoodputThroughOutage(Policy policy, const OutagePlan& plan);

// From the outage's begin until goodput is at least `part` of the remaining rails' rate, and stays so. 0: it
// never fell below.
Duration TimeToRecover(const std::vector<double>& goodput, const OutagePlan& plan, double part);

// The three as curves.
std::string GoodputSvg(const OutagePlan& plan);

}  // namespace millrace::sim
