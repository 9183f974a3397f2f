#pragma once
// Which addresses of this host make rails, and how the rails of two hosts are joined.

#include <string>
#include <vector>

#include "base/net.h"
#include "base/status.h"
#include "transfer/transfer.h"

namespace millrace::transfer {

struct InterfaceAddress {
  std::string interface;
  std::string host;  // numeric
  bool loopback = false;
};

// Every address of every interface that is up, except link-local ones.
StatusOr<std::vector<InterfaceAddress>> LocalAddresses();

// Those that `options` let through: shell patterns on interface name or address. Without an include list
// loopback and the bridges of container engines are left out.
std::vector<std::string> UsableHosts(const std::vector<InterfaceAddress>& all, const Options& options);

// Joins local to remote hosts (numeric): only addresses that can meet (family; loopback with loopback),
// nearest first (longest common prefix), every one of both lists used at least once if it can be. Pairs of
// indices, in the order of `remote`. A wildcard ("0.0.0.0", "::") meets its whole family.
std::vector<std::pair<size_t, size_t>> JoinRails(const std::vector<std::string>& local,
                                                 const std::vector<std::string>& remote);

}  // namespace millrace::transfer
