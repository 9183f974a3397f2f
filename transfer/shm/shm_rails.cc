#include "transfer/shm/shm_rails.h"

#include <algorithm>
#include <thread>

#include "base/log.h"
#include "base/random.h"
#include "transfer/local/local_rails.h"

namespace millrace::transfer {
namespace {

constexpr int kCopyThreadsMax = 2;

}  // namespace

ShmRails::ShmRails(const RailEnvironment& environment)
    : environment_(environment),
      token_(RandomId()),
      copier_(environment.loop,
              std::clamp(static_cast<int>(std::thread::hardware_concurrency()), 1, kCopyThreadsMax)),
      receiver_(&environment_, &copier_, &token_) {}

Status ShmRails::Start() {
  const std::string boot = BootId();
  const std::string socket_name = fmt::format("millrace-{:016x}", environment_.epoch);
  const Status status = boot.empty() ? FailedPrecondition("this host does not say which boot it is")
                                     : receiver_.Listen(socket_name);
  const auto& kinds = environment_.options->kinds;
  if (!status.ok() && std::find(kinds.begin(), kinds.end(), name()) != kinds.end())
    return Annotate(status, "shared-memory rail");
  if (status.ok()) address_ = boot + "/" + socket_name;
  return OkStatus();
}

std::vector<RailAddress> ShmRails::Addresses() const {
  if (address_.empty()) return {};
  return {{name(), address_}};
}

StatusOr<std::vector<std::unique_ptr<Path>>> ShmRails::MakePaths(const RemotePeer& peer, ControlChannel*) {
  std::vector<std::unique_ptr<Path>> paths;
  if (address_.empty()) return paths;
  if (environment_.options->kinds.empty() && LocalProcess::Find(peer.epoch) != nullptr) return paths;
  const std::string own_boot = address_.substr(0, address_.find('/'));
  for (const RailAddress& rail : peer.rails) {
    if (rail.kind != name()) continue;
    const size_t slash = rail.address.find('/');
    if (slash == std::string::npos || slash + 1 == rail.address.size() || rail.address.size() > 160)
      return InvalidArgument("'{}' is not the address of a shared-memory rail", rail.address);
    if (rail.address.substr(0, slash) != own_boot) continue;
    paths.push_back(std::make_unique<ShmPath>(&environment_, &copier_, &token_,
                                              rail.address.substr(slash + 1), peer.epoch));
    break;  // one way through memory is enough
  }
  return paths;
}

}  // namespace millrace::transfer
