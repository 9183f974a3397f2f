#pragma once
// Thread names and a checker that a class stays on the thread that its comment names.

#include <string>
#include <thread>

#include "base/check.h"

namespace millrace {

// Name of the calling thread as tools show it; longer names are cut to 15 characters.
void SetThreadName(const std::string& name);

// Bound to the first thread that calls Check(); any other thread's Check() ends the process.
class ThreadChecker {
 public:
  void Check() {
    if (owner_ == std::thread::id()) owner_ = std::this_thread::get_id();
    MR_CHECK(owner_ == std::this_thread::get_id(), "called from a thread that does not own this object");
  }

 private:
  std::thread::id owner_;
};

}  // namespace millrace
