#include "base/check.h"

#include <cstdio>
#include <cstdlib>

namespace millrace::internal {

void CheckFailed(const char* file, int line, const char* condition, std::string_view message) {
  // stderr and not the log: the logger may be what is broken.
  std::fprintf(stderr, "%s:%d: check failed: %s %.*s\n", file, line, condition,
               static_cast<int>(message.size()), message.data());
  std::abort();
}

}  // namespace millrace::internal
