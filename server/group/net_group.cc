#include "server/group/net_group.h"

#include "base/check.h"
#include "server/group/net_fabric.h"

namespace millrace::server {

StatusOr<std::unique_ptr<engine::ExpertGroup>> JoinNetGroup(const engine::RankGroupOptions& options,
                                                            const NetGroupOptions& net) {
  MR_RETURN_IF_ERROR(CheckRank(options));
  MR_CHECK(net.peers.size() == static_cast<size_t>(options.shape.num_ranks));
  auto fabric = std::make_unique<NetFabric>(options, net);
  MR_RETURN_IF_ERROR(fabric->Listen());
  return engine::JoinGroup(options, std::move(fabric));
}

}  // namespace millrace::server
