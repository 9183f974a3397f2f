#include "server/gateway/tls.h"

#include "base/log.h"
#include "server/gateway/api_keys.h"
#include "server/rpc/certificate.h"

namespace millrace::server {
namespace {

namespace ssl = boost::asio::ssl;

StatusOr<std::shared_ptr<ssl::context>> MakeContext(const TlsOptions& options) {
  auto context = std::make_shared<ssl::context>(ssl::context::tls_server);
  boost::system::error_code error;
  context->set_options(ssl::context::default_workarounds | ssl::context::no_sslv2 | ssl::context::no_sslv3 |
                           ssl::context::no_tlsv1 | ssl::context::no_tlsv1_1 | ssl::context::no_compression,
                       error);
  if (error) return Internal("TLS: {}", error.message());
  context->use_certificate_chain_file(options.certificate, error);
  if (error) return InvalidArgument("TLS certificate {}: {}", options.certificate, error.message());
  context->use_private_key_file(options.key, ssl::context::pem, error);
  if (error) return InvalidArgument("TLS key {}: {}", options.key, error.message());
  if (SSL_CTX_check_private_key(context->native_handle()) != 1)
    return InvalidArgument("TLS: the key {} does not belong to {}", options.key, options.certificate);
  // Served all the same: clients judge, and a clock may be wrong.
  if (const std::string problem = ValidityProblem(options.certificate); !problem.empty())
    LogWarning("TLS certificate {} {}: clients will refuse it", options.certificate, problem);
  if (!options.client_ca.empty()) {
    context->load_verify_file(options.client_ca, error);
    if (error) return InvalidArgument("TLS client CA {}: {}", options.client_ca, error.message());
    context->set_verify_mode(ssl::verify_peer | ssl::verify_fail_if_no_peer_cert, error);
    if (error) return Internal("TLS: {}", error.message());
  }
  return context;
}

}  // namespace

StatusOr<std::unique_ptr<TlsContext>> TlsContext::Load(const TlsOptions& options) {
  std::unique_ptr<TlsContext> tls(new TlsContext(options));
  tls->version_ = tls->Version();
  MR_ASSIGN_OR_RETURN(tls->context_, MakeContext(options));
  return tls;
}

std::string TlsContext::Version() const {
  return FileVersion(options_.certificate) + "," + FileVersion(options_.key) + "," +
         FileVersion(options_.client_ca);
}

std::shared_ptr<ssl::context> TlsContext::Get() const {
  std::lock_guard lock(mutex_);
  return context_;
}

Status TlsContext::ReloadIfChanged() {
  const std::string version = Version();
  {
    std::lock_guard lock(mutex_);
    if (version == version_) return OkStatus();
    version_ = version;
  }
  MR_ASSIGN_OR_RETURN(auto context, MakeContext(options_));
  std::lock_guard lock(mutex_);
  context_ = std::move(context);
  return OkStatus();
}

}  // namespace millrace::server
