#pragma once
// What is wrong with certificates, said before anybody is asked to trust them.

#include <string>

#include "base/status.h"

namespace millrace::server {

// PEM files. InvalidArgument names the file that cannot be used: it is not there, holds no certificate
// (chain) or key, or the two do not belong together.
Status CheckCertificate(const std::string& certificate, const std::string& key);

// InvalidArgument unless whoever trusts the authorities in `ca` would take the certificate, now: it must be
// signed by one of them, with the rest of its file as the way there, and be valid at this time.
Status CheckTrusted(const std::string& certificate, const std::string& ca);

// "" while the certificate is valid; else since when it is not, or that it is not yet.
std::string ValidityProblem(const std::string& certificate);

}  // namespace millrace::server
