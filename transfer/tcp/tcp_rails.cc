#include "transfer/tcp/tcp_rails.h"

#include "base/log.h"
#include "transfer/tcp/interfaces.h"

namespace millrace::transfer {
namespace {

constexpr size_t kRemoteRailsMax = 64;  // of one peer
// A slice is summed and then sent, the second time from the processor's second cache.
constexpr uint32_t kSliceBytes = 512 << 10;

StatusOr<std::vector<HostPort>> RemoteRails(const RemotePeer& peer) {
  std::vector<HostPort> remotes;
  for (const RailAddress& rail : peer.rails) {
    if (rail.kind != "tcp") continue;
    MR_ASSIGN_OR_RETURN(HostPort remote, ParseHostPort(rail.address));
    if (remotes.size() == kRemoteRailsMax)
      return InvalidArgument("a peer with more than {} rails", kRemoteRailsMax);
    remotes.push_back(std::move(remote));
  }
  return remotes;
}

// What listens everywhere says nothing about where to send from.
std::string BindHost(const std::string& host) { return host == "0.0.0.0" || host == "::" ? "" : host; }

}  // namespace

Status TcpRails::Start() {
  for (const std::string& text : environment_.options->listen) {
    std::vector<HostPort> wanted;
    if (text == "auto" || text.starts_with("auto:")) {
      MR_ASSIGN_OR_RETURN(const HostPort port, ParseHostPort(text == "auto" ? ":0" : text.substr(4)));
      MR_ASSIGN_OR_RETURN(const auto addresses, LocalAddresses());
      for (const std::string& host : UsableHosts(addresses, *environment_.options))
        wanted.push_back({host, port.port});
      if (wanted.empty()) return NotFound("rails 'auto': this host has no usable network address");
    } else {
      MR_ASSIGN_OR_RETURN(const HostPort name, ParseHostPort(text));
      MR_ASSIGN_OR_RETURN(const std::vector<HostPort> addresses, Resolve(name));
      wanted.push_back(addresses.front());
    }
    for (const HostPort& address : wanted) {
      HostPort bound;
      MR_RETURN_IF_ERROR(receiver_.Listen(address, &bound));
      rails_.push_back(bound);
    }
  }
  return OkStatus();
}

std::vector<RailAddress> TcpRails::Addresses() const {
  std::vector<RailAddress> addresses;
  for (const HostPort& rail : rails_) addresses.push_back({name(), rail.ToString()});
  return addresses;
}

RailKind::Control TcpRails::MakeControl(const RemotePeer& peer) {
  auto remotes = RemoteRails(peer);
  if (!remotes.ok() || remotes->empty()) return {};
  TcpPath::Target target;
  target.traits = {.kind = name(),
                   .local_rail = "any",
                   .remote_rail = remotes->front().ToString(),
                   .carries_slices = false};
  target.remotes = *std::move(remotes);
  target.expected_epoch = peer.epoch;
  auto control = std::make_unique<TcpControl>(&environment_, target);
  ControlChannel* const channel = control.get();
  return {std::move(control), channel};
}

StatusOr<std::vector<std::unique_ptr<Path>>> TcpRails::MakePaths(const RemotePeer& peer, ControlChannel*) {
  if (!carries_slices_) return std::vector<std::unique_ptr<Path>>();
  MR_ASSIGN_OR_RETURN(const std::vector<HostPort> remotes, RemoteRails(peer));
  std::vector<std::string> local, remote;
  for (const HostPort& rail : rails_) local.push_back(rail.host);
  for (const HostPort& rail : remotes) remote.push_back(rail.host);
  auto pairs = JoinRails(local, remote);
  // A process that cannot be reached itself sends from wherever the system likes.
  std::vector<std::unique_ptr<Path>> paths;
  const auto add = [&](const std::string& from, const HostPort& to) {
    TcpPath::Target target;
    target.local_host = from;
    target.remotes = {to};
    target.expected_epoch = peer.epoch;
    target.traits = {.kind = name(),
                     .local_rail = from.empty() ? "any" : from,
                     .remote_rail = to.ToString(),
                     .slice_bytes_max = kSliceBytes};
    for (uint32_t c = 0; c < environment_.options->connections_per_path; ++c)
      paths.push_back(std::make_unique<TcpPath>(&environment_, target));
  };
  if (pairs.empty()) {
    for (const HostPort& to : remotes) add("", to);
  }
  for (const auto& [from, to] : pairs) add(BindHost(rails_[from].host), remotes[to]);
  return paths;
}

}  // namespace millrace::transfer
