#include "server/rpc/peer_tls.h"

#include <grpc/support/log.h>
#include <grpcpp/security/tls_certificate_provider.h>
#include <grpcpp/security/tls_credentials_options.h>

#include <map>
#include <mutex>
#include <string_view>

#include "base/clock.h"
#include "base/log.h"
#include "server/rpc/certificate.h"

namespace millrace::server {
namespace {

constexpr unsigned kReloadSeconds = 1;
constexpr Duration kRepeatAfter = std::chrono::seconds(10);
constexpr size_t kKindsMax = 64;

// What OpenSSL calls the failures of a handshake, and what they mean here.
struct Meaning {
  std::string_view error;
  const char* meaning;
};
constexpr Meaning kMeanings[] = {
    {"certificate verify failed",
     "its certificate is not signed by the authorities that this process trusts, or not valid at this time"},
    {"peer did not return a certificate", "it shows no certificate"},
    {"wrong version number", "it does not speak TLS"},
    {"http request", "it does not speak TLS"},
};

std::string InWords(std::string_view text) {
  for (const Meaning& each : kMeanings) {
    if (text.find(each.error) == std::string_view::npos) continue;
    return fmt::format("TLS: somebody was refused: {} ({})", each.meaning, each.error);
  }
  return "gRPC: " + std::string(text);
}

// A peer that is refused comes again every second.
bool SaidLately(const std::string& text) {
  // Never destroyed: gRPC's threads may still speak when the process ends.
  static auto& mutex = *new std::mutex;
  static auto& said = *new std::map<std::string, TimePoint>;
  const TimePoint now = Clock::System().Now();
  const std::lock_guard lock(mutex);
  if (said.size() >= kKindsMax) said.clear();
  const auto [entry, first] = said.emplace(text, now);
  if (!first && now - entry->second < kRepeatAfter) return true;
  entry->second = now;
  return false;
}

void Log(gpr_log_func_args* line) {
  const std::string text = InWords(line->message);
  if (!SaidLately(text)) LogWarning("{}", text);
}

}  // namespace

void TakeOverGrpcLog() { gpr_set_log_function(Log); }

StatusOr<PeerCredentials> MakePeerCredentials(const PeerTlsOptions& options) {
  if (!options.enabled()) return PeerCredentials();
  if (options.ca.empty() || options.certificate.empty() || options.key.empty())
    return InvalidArgument("TLS between the roles needs authorities, a certificate and its key");
  MR_RETURN_IF_ERROR(CheckCertificate(options.certificate, options.key));
  MR_RETURN_IF_ERROR(CheckTrusted(options.certificate, options.ca));

  namespace exp = grpc::experimental;
  const auto files = std::make_shared<exp::FileWatcherCertificateProvider>(options.key, options.certificate,
                                                                           options.ca, kReloadSeconds);
  PeerCredentials credentials;
  exp::TlsServerCredentialsOptions server(files);
  server.watch_identity_key_cert_pairs();
  server.watch_root_certs();
  server.set_cert_request_type(GRPC_SSL_REQUEST_AND_REQUIRE_CLIENT_CERTIFICATE_AND_VERIFY);
  credentials.server = exp::TlsServerCredentials(server);

  exp::TlsChannelCredentialsOptions channel;
  channel.set_certificate_provider(files);
  channel.watch_identity_key_cert_pairs();
  channel.watch_root_certs();
  // The chain is verified; the name in it is not compared with the address.
  channel.set_certificate_verifier(std::make_shared<exp::NoOpCertificateVerifier>());
  channel.set_check_call_host(false);
  credentials.channel = exp::TlsCredentials(channel);
  return credentials;
}

}  // namespace millrace::server
