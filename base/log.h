#pragma once
// Process-wide log on stderr, through spdlog. Any thread. Log once, where the cause is known; never prompt
// text.

#include <spdlog/spdlog.h>

#include <string>

#include "base/status.h"

namespace millrace {

struct LogOptions {
  std::string level = "info";   // trace, debug, info, warn, error, off
  std::string format = "text";  // text, or json: one object per line
};

// Applies the options. An unknown level or format is InvalidArgument and changes nothing. Call once, at
// start.
Status ConfigureLog(const LogOptions& options);

template <typename... Args>
void LogDebug(fmt::format_string<Args...> format, Args&&... args) {
  spdlog::debug(format, std::forward<Args>(args)...);
}
template <typename... Args>
void LogInfo(fmt::format_string<Args...> format, Args&&... args) {
  spdlog::info(format, std::forward<Args>(args)...);
}
template <typename... Args>
void LogWarning(fmt::format_string<Args...> format, Args&&... args) {
  spdlog::warn(format, std::forward<Args>(args)...);
}
template <typename... Args>
void LogError(fmt::format_string<Args...> format, Args&&... args) {
  spdlog::error(format, std::forward<Args>(args)...);
}

}  // namespace millrace
