#pragma once
// The certificate of the public listener, replaced while running.

#include <boost/asio/ssl.hpp>
#include <memory>
#include <mutex>
#include <string>

#include "base/status.h"

namespace millrace::server {

struct TlsOptions {
  std::string certificate;  // PEM file: the certificate, then its chain; empty: no TLS
  std::string key;          // PEM file
  std::string client_ca;    // PEM file; when given, clients must show a certificate that it signed
};

// Thread-safe.
class TlsContext {
 public:
  // InvalidArgument names the file that cannot be used.
  static StatusOr<std::unique_ptr<TlsContext>> Load(const TlsOptions& options);

  // For a new connection; shared, because the connection may outlive the next reload.
  std::shared_ptr<boost::asio::ssl::context> Get() const;
  // Loads the files again when one has changed. On an error the old certificate stays.
  Status ReloadIfChanged();

 private:
  explicit TlsContext(TlsOptions options) : options_(std::move(options)) {}
  std::string Version() const;

  const TlsOptions options_;
  mutable std::mutex mutex_;
  std::shared_ptr<boost::asio::ssl::context> context_;
  std::string version_;
};

}  // namespace millrace::server
