// Draws goodput through an outage: sim_report FILE.svg
#include <cstdio>

#include "base/file.h"
#include "base/log.h"
#include "tests/sim/goodput.h"

int main(int argc, char** argv) {
  if (argc != 2) {
    std::fprintf(stderr, "usage: sim_report FILE.svg\n");
    return 2;
  }
  if (!millrace::ConfigureLog({.level = "error", .format = "text"}).ok()) return 1;
  const millrace::Status status = millrace::WriteFileAtomically(argv[1], millrace::sim::GoodputSvg({}));
  if (!status.ok()) std::fprintf(stderr, "%s\n", status.ToString().c_str());
  return status.ok() ? 0 : 1;
}
