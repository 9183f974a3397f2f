#include "server/rpc/certificate.h"

#include <openssl/err.h>
#include <openssl/ssl.h>
#include <openssl/x509.h>
#include <openssl/x509_vfy.h>

#include <array>
#include <memory>

namespace millrace::server {
namespace {

using Context = std::unique_ptr<SSL_CTX, decltype(&SSL_CTX_free)>;

Context NewContext() { return {SSL_CTX_new(TLS_method()), SSL_CTX_free}; }

// The library's words for what went wrong last.
std::string LastError() {
  std::array<char, 256> text{};
  ERR_error_string_n(ERR_get_error(), text.data(), text.size());
  ERR_clear_error();
  return text.data();
}

Status Load(SSL_CTX* context, const std::string& certificate) {
  if (SSL_CTX_use_certificate_chain_file(context, certificate.c_str()) == 1) return OkStatus();
  return InvalidArgument("certificate {}: {}", certificate, LastError());
}

std::string Text(const ASN1_TIME* time) {
  const std::unique_ptr<BIO, decltype(&BIO_free)> out(BIO_new(BIO_s_mem()), BIO_free);
  ASN1_TIME_print(out.get(), time);
  char* data = nullptr;
  const auto size = static_cast<size_t>(BIO_get_mem_data(out.get(), &data));
  return {data, size};
}

}  // namespace

Status CheckCertificate(const std::string& certificate, const std::string& key) {
  const Context context = NewContext();
  MR_RETURN_IF_ERROR(Load(context.get(), certificate));
  if (SSL_CTX_use_PrivateKey_file(context.get(), key.c_str(), SSL_FILETYPE_PEM) != 1) {
    // Also when both can be read, but do not belong together.
    return InvalidArgument("key {} of certificate {}: {}", key, certificate, LastError());
  }
  return OkStatus();
}

Status CheckTrusted(const std::string& certificate, const std::string& ca) {
  const Context context = NewContext();
  MR_RETURN_IF_ERROR(Load(context.get(), certificate));
  if (SSL_CTX_load_verify_file(context.get(), ca.c_str()) != 1)
    return InvalidArgument("authorities {}: {}", ca, LastError());
  STACK_OF(X509)* chain = nullptr;
  SSL_CTX_get0_chain_certs(context.get(), &chain);
  const std::unique_ptr<X509_STORE_CTX, decltype(&X509_STORE_CTX_free)> check(X509_STORE_CTX_new(),
                                                                              X509_STORE_CTX_free);
  X509_STORE_CTX_init(check.get(), SSL_CTX_get_cert_store(context.get()),
                      SSL_CTX_get0_certificate(context.get()), chain);
  if (X509_verify_cert(check.get()) == 1) return OkStatus();
  return InvalidArgument("certificate {} is not good for those who trust {}: {}", certificate, ca,
                         X509_verify_cert_error_string(X509_STORE_CTX_get_error(check.get())));
}

std::string ValidityProblem(const std::string& certificate) {
  const Context context = NewContext();
  if (!Load(context.get(), certificate).ok()) return {};
  const X509* const loaded = SSL_CTX_get0_certificate(context.get());
  const ASN1_TIME* const begin = X509_get0_notBefore(loaded);
  const ASN1_TIME* const end = X509_get0_notAfter(loaded);
  if (X509_cmp_current_time(end) < 0) return fmt::format("expired on {}", Text(end));
  if (X509_cmp_current_time(begin) > 0) return fmt::format("is not valid before {}", Text(begin));
  return {};
}

}  // namespace millrace::server
