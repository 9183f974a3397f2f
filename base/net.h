#pragma once
// Names and addresses. Blocking resolution: never call it on an engine, I/O or gRPC callback thread.

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "base/status.h"

namespace millrace {

struct HostPort {
  std::string host;  // name, IPv4, or IPv6 without brackets
  uint16_t port = 0;
  std::string ToString() const;  // "host:port", "[v6]:port"
  bool operator==(const HostPort&) const = default;
};

// "host:port", "[v6]:port", ":port" (host = default_host), or "host" when default_port is not 0.
StatusOr<HostPort> ParseHostPort(std::string_view text, std::string_view default_host = "127.0.0.1",
                                 uint16_t default_port = 0);

// Every address that the name has now, numeric, sorted, without repeats.
StatusOr<std::vector<HostPort>> Resolve(const HostPort& name);

// True for well-formed UTF-8 (no surrogates, no overlong forms, at most U+10FFFF).
bool IsUtf8(std::string_view text);

}  // namespace millrace
