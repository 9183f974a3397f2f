// The one list of kinds of rail.
#include <algorithm>

#include "transfer/local/local_rails.h"
#include "transfer/rail.h"
#include "transfer/rdma/make.h"
#include "transfer/shm/shm_rails.h"
#include "transfer/tcp/tcp_rails.h"

namespace millrace::transfer {

std::vector<std::unique_ptr<RailKind>> MakeRailKinds(const RailEnvironment& environment) {
  const auto& wanted = environment.options->kinds;
  std::vector<std::unique_ptr<RailKind>> kinds;
  const auto asked = [&](const char* name) {
    return wanted.empty() || std::find(wanted.begin(), wanted.end(), name) != wanted.end();
  };
  const auto add = [&](const char* name, auto make) {
    if (asked(name)) kinds.push_back(make());
  };
  add("local", [&] { return std::make_unique<LocalRails>(environment); });
  add("rdma", [&] { return rdma::MakeRdmaRails(environment); });
  // Links of other kinds are arranged over tcp's control session; where tcp is not asked for it carries
  // nothing else.
  if (asked("tcp") || asked("rdma")) kinds.push_back(std::make_unique<TcpRails>(environment, asked("tcp")));
  add("shm", [&] { return std::make_unique<ShmRails>(environment); });
  return kinds;
}

}  // namespace millrace::transfer
