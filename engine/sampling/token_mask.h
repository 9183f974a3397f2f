#pragma once
// Which tokens may come next: the seam between sampling and whatever constrains an answer.

#include <cstdint>
#include <span>

namespace millrace::engine {

// Belongs to one sequence; one thread at a time. A pure function of `output`: what an implementation
// remembers of earlier calls makes it faster and changes nothing, so an answer may be continued on another
// worker, and output may shrink between calls (rejected drafts).
class TokenMask {
 public:
  virtual ~TokenMask() = default;

  struct Allowed {
    // Bit t % 64 of word t / 64: token t may follow. At least one bit is set, or may_end is. Valid until the
    // next call.
    std::span<const uint64_t> tokens;
    bool may_end = false;  // the answer may end here: its end tokens are allowed too
  };
  virtual Allowed After(std::span<const int32_t> output) = 0;
};

}  // namespace millrace::engine
