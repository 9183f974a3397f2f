// doctor: says in plain words whether this machine can serve, and what would make it serve better.
#include <unistd.h>

#include <algorithm>

#include "base/json.h"
#include "server/cli/commands.h"
#include "server/cli/doctor_findings.h"

namespace millrace::server {
namespace {

constexpr const char* kNames[] = {"ok", "note", "problem"};

void PrintText(const std::vector<Finding>& findings) {
  for (const Finding& finding : findings) {
    fmt::print("{:<8} {}: {}\n", kNames[static_cast<int>(finding.severity)], finding.topic, finding.what);
    if (finding.severity == Severity::kGood) continue;
    fmt::print("           why it matters: {}\n           how to mend it: {}\n", finding.why, finding.mend);
  }
}

void PrintJson(const std::vector<Finding>& findings, bool can_serve) {
  OrderedJson list = OrderedJson::array();
  for (const Finding& finding : findings) {
    OrderedJson entry = {{"topic", finding.topic},
                         {"severity", kNames[static_cast<int>(finding.severity)]},
                         {"what", finding.what}};
    if (finding.severity != Severity::kGood) {
      entry["why"] = finding.why;
      entry["mend"] = finding.mend;
    }
    list.push_back(std::move(entry));
  }
  fmt::print("{}\n", DumpJson(OrderedJson{{"can_serve", can_serve}, {"findings", std::move(list)}}));
}

}  // namespace

int RunDoctor(const DoctorOptions& options) {
  Needs needs;
  const auto required = [&](const char* what) {
    return std::find(options.require.begin(), options.require.end(), what) != options.require.end();
  };
  needs.rdma = required("rdma");
  needs.gpu = required("gpu");
  const StatusOr<size_t> memory = ParseBytes(options.memory);
  if (!memory.ok()) {
    fmt::print(stderr, "millrace doctor: --memory: {}\n", Message(memory.status()));
    return 1;
  }
  needs.memory_bytes = *memory;
  const std::vector<Finding> findings = Judge(ReadMachineFacts(options.listen, options.peers), needs);
  const auto problems = std::count_if(findings.begin(), findings.end(), [](const Finding& finding) {
    return finding.severity == Severity::kProblem;
  });
  if (options.json) {
    PrintJson(findings, problems == 0);
  } else {
    PrintText(findings);
    fmt::print("{}\n", problems == 0 ? std::string("This machine can serve.")
                                     : fmt::format("This machine cannot serve as asked: {} problem{}.",
                                                   problems, problems == 1 ? "" : "s"));
  }
  return problems == 0 ? 0 : 1;
}

}  // namespace millrace::server
