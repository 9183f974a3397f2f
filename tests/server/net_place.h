#pragma once
// Ranks that meet over sockets.

#include <string>
#include <vector>

#include "base/net.h"
#include "tests/engine/expert_group_rig.h"

namespace millrace::server {

// Addresses on 127.0.0.1 that nobody listens on now.
std::vector<HostPort> FreeAddresses(int count);
// Every rank at its own of these; dialled there, or where `dialled` says.
std::unique_ptr<engine::GroupPlace> PlaceAt(std::vector<HostPort> addresses,
                                            std::vector<std::string> rails = {"127.0.0.1:0"},
                                            std::vector<HostPort> dialled = {});

}  // namespace millrace::server
