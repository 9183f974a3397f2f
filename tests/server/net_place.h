#pragma once
// Ranks that meet over sockets.

#include <vector>

#include "base/net.h"
#include "tests/engine/expert_group_rig.h"

namespace millrace::server {

// Addresses on 127.0.0.1 that nobody listens on now.
std::vector<HostPort> FreeAddresses(int count);
// Every rank at its own of these.
std::unique_ptr<engine::GroupPlace> PlaceAt(std::vector<HostPort> addresses);

}  // namespace millrace::server
