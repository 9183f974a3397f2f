#pragma once
// The hand-over protocol under faults: the production calls of gateways (Generation), decode workers
// (GenerateCall, ImportAttempt) and prefill workers (PrefillCall), with the production router, breakers,
// budgets and ticket table, over modelled engines, bytes and calls. Clients ask, leave, and ask another
// gateway when theirs is gone; checkers compare each token with the undisturbed answer, and at the end
// nothing may be held anywhere, in the dead processes neither.

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "base/clock.h"

namespace millrace::sim {

enum class HandoverFault { kKill, kFreeze, kHole, kCut, kHostHole, kStall, kDrain };
inline constexpr HandoverFault kHandoverFaults[] = {
    HandoverFault::kKill,     HandoverFault::kFreeze, HandoverFault::kHole, HandoverFault::kCut,
    HandoverFault::kHostHole, HandoverFault::kStall,  HandoverFault::kDrain};
const char* Name(HandoverFault fault);

// Mistakes that are planted where the protocol meets its surroundings: each is what the system would look
// like if one side made it.
enum class HandoverBug {
  kNone,
  kPagesBeforeClose,    // D lets go of pages that P may still write to
  kPagesBeforeFence,    // P lets go of pages that are still being read
  kTicketForgotten,     // a ticket that is closed is never found drained
  kFailedImportCached,  // pages of an import that failed count as good
  kCancelForgotten,     // an engine goes on with what was cancelled
  kCancelNotPassedOn,   // a worker never hears that its caller is gone
  kLossNotTold,         // a caller never hears that its worker is gone
  kMessageRepeated,     // a message comes twice
  kContinuesFromStart,  // the tokens so far do not go to the next worker
  kContinuesOtherwise,  // the next worker draws with another seed
  kDrawsByProcess,      // what is drawn depends on the process
};
inline constexpr HandoverBug kHandoverBugs[] = {
    HandoverBug::kPagesBeforeClose,   HandoverBug::kPagesBeforeFence, HandoverBug::kTicketForgotten,
    HandoverBug::kFailedImportCached, HandoverBug::kCancelForgotten,  HandoverBug::kCancelNotPassedOn,
    HandoverBug::kLossNotTold,        HandoverBug::kMessageRepeated,  HandoverBug::kContinuesFromStart,
    HandoverBug::kContinuesOtherwise, HandoverBug::kDrawsByProcess};
const char* Name(HandoverBug bug);

// A fault that strikes as a message arrives: its number, and which of the two processes is hit.
struct HandoverStrike {
  HandoverFault fault = HandoverFault::kKill;
  uint64_t message = 0;
  bool sender = false;
};

struct HandoverPlan {
  uint64_t seed = 1;
  HandoverBug bug = HandoverBug::kNone;
  bool damaged_bytes = false;  // the wire changes bits and nobody notices on the way
  // Instead of what the seed would bring: one request, one gateway, two workers of each role, this fault.
  std::optional<HandoverStrike> only = {};
};

struct HandoverOutcome {
  std::string violation;  // empty: none
  uint64_t events = 0;
  uint64_t messages = 0;
  int answered = 0;     // in full
  int failed = 0;       // with a proper error
  int left = 0;         // clients that went away
  int asked_again = 0;  // at another gateway
  int faults = 0;
  uint64_t tokens = 0;
  uint64_t continued = 0;  // decode workers that went on with another one's answer
  Duration worst_gap{};    // between two tokens, or before the first, of an answer
};

// The same plan gives the same outcome. What a violation left behind is not taken apart: its memory is lost.
HandoverOutcome RunHandover(const HandoverPlan& plan);

}  // namespace millrace::sim
