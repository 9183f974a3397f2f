#pragma once
// What follows from a machine's facts: what is good, what costs speed, what prevents serving.

#include <cstdint>
#include <string>
#include <vector>

#include "server/cli/doctor_facts.h"

namespace millrace::server {

enum class Severity { kGood, kNote, kProblem };

// Each a sentence or two for a person. A good finding has `what` alone.
struct Finding {
  std::string topic;
  Severity severity = Severity::kGood;
  std::string what;
  std::string why;  // it matters
  std::string mend;
};

// What the process that is to start here needs.
struct Needs {
  bool rdma = false;
  bool gpu = false;
  uint64_t memory_bytes = 0;  // 0: not said
};

// Pure. A problem is what serving as asked cannot do without; everything else is a note at most.
std::vector<Finding> Judge(const MachineFacts& facts, const Needs& needs);

}  // namespace millrace::server
