#pragma once
// Who may speak to whom between Millrace's own processes: mutual TLS, or nothing.

#include <grpcpp/grpcpp.h>

#include <memory>
#include <string>

#include "base/status.h"

namespace millrace::server {

// PEM files, all three or none. Whoever holds a certificate that an authority in `ca` signed is one of us:
// names are not compared, because workers are found by addresses that change. So the authority must sign
// nothing else.
struct PeerTlsOptions {
  std::string ca;
  std::string certificate;  // own, then its chain; shown to both callers and called
  std::string key;
  bool enabled() const { return !ca.empty() || !certificate.empty() || !key.empty(); }
};

// What one process serves its own kind with, and asks them with.
struct PeerCredentials {
  std::shared_ptr<grpc::ServerCredentials> server = grpc::InsecureServerCredentials();
  std::shared_ptr<grpc::ChannelCredentials> channel = grpc::InsecureChannelCredentials();
};

// InvalidArgument names the file that cannot be used, or why the others would not take this process's
// certificate. The files are read again within a second of a change; connections that exist stay.
StatusOr<PeerCredentials> MakePeerCredentials(const PeerTlsOptions& options);

// gRPC's complaints, among them about certificates that it refused, go to the process's own log, each kind
// once in ten seconds. Once, at start.
void TakeOverGrpcLog();

}  // namespace millrace::server
