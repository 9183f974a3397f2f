#include "base/net.h"

#include <arpa/inet.h>
#include <netdb.h>

#include <algorithm>
#include <charconv>

namespace millrace {

std::string HostPort::ToString() const {
  return host.find(':') == std::string::npos ? fmt::format("{}:{}", host, port)
                                             : fmt::format("[{}]:{}", host, port);
}

StatusOr<HostPort> ParseHostPort(std::string_view text, std::string_view default_host,
                                 uint16_t default_port) {
  HostPort result;
  result.port = default_port;
  std::string_view port_text;
  bool has_port = false;
  if (!text.empty() && text.front() == '[') {
    const size_t close = text.find(']');
    if (close == std::string_view::npos) return InvalidArgument("address '{}': '[' without ']'", text);
    result.host = text.substr(1, close - 1);
    const std::string_view rest = text.substr(close + 1);
    if (!rest.empty() && rest.front() != ':')
      return InvalidArgument("address '{}': ':' expected after ']'", text);
    has_port = !rest.empty();
    if (has_port) port_text = rest.substr(1);
  } else if (const size_t colon = text.rfind(':'); colon != std::string_view::npos) {
    if (text.find(':') != colon) return InvalidArgument("address '{}': write IPv6 as [address]:port", text);
    result.host = text.substr(0, colon);
    port_text = text.substr(colon + 1);
    has_port = true;
  } else {
    result.host = text;
  }
  if (has_port) {
    const auto [end, error] =
        std::from_chars(port_text.data(), port_text.data() + port_text.size(), result.port);
    if (error != std::errc() || end != port_text.data() + port_text.size()) {
      return InvalidArgument("address '{}': '{}' is not a port number (0 to 65535)", text, port_text);
    }
  } else if (default_port == 0) {
    return InvalidArgument("address '{}': a port is missing (host:port)", text);
  }
  if (result.host.empty()) result.host = default_host;
  if (result.host.empty()) return InvalidArgument("address '{}': a host is missing (host:port)", text);
  return result;
}

StatusOr<std::vector<HostPort>> Resolve(const HostPort& name) {
  addrinfo hints{};
  hints.ai_socktype = SOCK_STREAM;
  addrinfo* found = nullptr;
  const int error = getaddrinfo(name.host.c_str(), nullptr, &hints, &found);
  if (error != 0) return Unavailable("cannot resolve '{}': {}", name.host, gai_strerror(error));
  std::vector<HostPort> addresses;
  for (const addrinfo* entry = found; entry != nullptr; entry = entry->ai_next) {
    char text[NI_MAXHOST];
    if (getnameinfo(entry->ai_addr, entry->ai_addrlen, text, sizeof(text), nullptr, 0, NI_NUMERICHOST) == 0) {
      addresses.push_back({text, name.port});
    }
  }
  freeaddrinfo(found);
  std::sort(addresses.begin(), addresses.end(), [](const auto& a, const auto& b) { return a.host < b.host; });
  addresses.erase(std::unique(addresses.begin(), addresses.end()), addresses.end());
  if (addresses.empty()) return Unavailable("'{}' has no address", name.host);
  return addresses;
}

bool IsUtf8(std::string_view text) {
  const auto* p = reinterpret_cast<const unsigned char*>(text.data());
  const auto* const end = p + text.size();
  while (p < end) {
    const unsigned char lead = *p++;
    if (lead < 0x80) continue;
    int count = 0;
    uint32_t code = 0;
    if (lead >= 0xc2 && lead <= 0xdf) {
      count = 1, code = lead & 0x1fU;
    } else if (lead >= 0xe0 && lead <= 0xef) {
      count = 2, code = lead & 0x0fU;
    } else if (lead >= 0xf0 && lead <= 0xf4) {
      count = 3, code = lead & 0x07U;
    } else {
      return false;
    }
    if (end - p < count) return false;
    for (int i = 0; i < count; ++i, ++p) {
      if ((*p & 0xc0U) != 0x80U) return false;
      code = (code << 6) | (*p & 0x3fU);
    }
    if ((count == 2 && code < 0x800) || (count == 3 && (code < 0x10000 || code > 0x10ffff))) return false;
    if (code >= 0xd800 && code <= 0xdfff) return false;
  }
  return true;
}

}  // namespace millrace
