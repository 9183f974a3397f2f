#pragma once
// Expert groups over several hosts: what ranks show each other goes through a transfer engine of the group's
// own, over all rails; membership and progress through one link between any two ranks (rank_link.h).

#include <memory>
#include <string>
#include <vector>

#include "base/metrics.h"
#include "base/net.h"
#include "engine/moe/rank_group.h"

namespace millrace::server {

struct NetGroupOptions {
  HostPort listen;                 // where this rank is dialled
  std::vector<HostPort> peers;     // by rank, names or addresses; looked up each time one is dialled
  std::vector<std::string> rails;  // as transfer::Options::listen
  Metrics* metrics = nullptr;      // may be null; outlives the group
};

// Joins the group, and returns once it has been complete, as engine::JoinGroup says. Beyond that: Unavailable
// names an address that cannot be listened on; FailedPrecondition: another rank serves another model, or with
// another weight format, batch size or number of ranks. Neither encrypted nor authenticated: a network for
// the ranks alone.
StatusOr<std::unique_ptr<engine::ExpertGroup>> JoinNetGroup(const engine::RankGroupOptions& options,
                                                            const NetGroupOptions& net);

}  // namespace millrace::server
