// role: asks a worker to take another role; it does when it is idle.
#include "base/net.h"
#include "proto/worker.grpc.pb.h"
#include "server/cli/commands.h"
#include "server/rpc/channel.h"
#include "server/rpc/peer_tls.h"

namespace millrace::server {
namespace {

constexpr auto kPatience = std::chrono::seconds(5);

Status Ask(const RoleOptions& options) {
  MR_RETURN_IF_ERROR(ParseHostPort(options.worker).status());
  MR_ASSIGN_OR_RETURN(const PeerCredentials peers,
                      MakePeerCredentials({options.peer.ca, options.peer.cert, options.peer.key}));
  worker::v1::SetRoleRequest request;
  request.set_role(options.role == "prefill"  ? worker::v1::PREFILL
                   : options.role == "decode" ? worker::v1::DECODE
                                              : worker::v1::BOTH);
  const auto channel = grpc::CreateCustomChannel(options.worker, peers.channel, ChannelArguments());
  grpc::ClientContext context;
  context.set_deadline(std::chrono::system_clock::now() + kPatience);
  worker::v1::SetRoleReply reply;
  return FromGrpc(worker::v1::Worker::NewStub(channel)->SetRole(&context, request, &reply));
}

}  // namespace

int RunRole(const RoleOptions& options) {
  const Status status = Ask(options);
  if (status.ok()) return 0;
  fmt::print(stderr, "millrace role: {}\n", Message(status));
  return 1;
}

}  // namespace millrace::server
