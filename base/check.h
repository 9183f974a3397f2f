#pragma once
// MR_CHECK: a programmer's error ends the process, in release builds too. Operating errors are Status, never
// this.

#include <fmt/core.h>

#include <string_view>

namespace millrace::internal {
[[noreturn]] void CheckFailed(const char* file, int line, const char* condition, std::string_view message);
}  // namespace millrace::internal

// MR_CHECK(condition) or MR_CHECK(condition, "format {}", value).
#define MR_CHECK(condition, ...)                                                                        \
  do {                                                                                                  \
    if (!(condition)) [[unlikely]]                                                                      \
      ::millrace::internal::CheckFailed(__FILE__, __LINE__, #condition, ::fmt::format("" __VA_ARGS__)); \
  } while (false)
