// The one list of kinds of rail.
#include <algorithm>

#include "transfer/local/local_rails.h"
#include "transfer/rail.h"
#include "transfer/shm/shm_rails.h"
#include "transfer/tcp/tcp_rails.h"

namespace millrace::transfer {

std::vector<std::unique_ptr<RailKind>> MakeRailKinds(const RailEnvironment& environment) {
  const auto& wanted = environment.options->kinds;
  std::vector<std::unique_ptr<RailKind>> kinds;
  const auto add = [&](const char* name, auto make) {
    if (wanted.empty() || std::find(wanted.begin(), wanted.end(), name) != wanted.end())
      kinds.push_back(make());
  };
  add("local", [&] { return std::make_unique<LocalRails>(environment); });
  add("tcp", [&] { return std::make_unique<TcpRails>(environment); });
  add("shm", [&] { return std::make_unique<ShmRails>(environment); });
  return kinds;
}

}  // namespace millrace::transfer
