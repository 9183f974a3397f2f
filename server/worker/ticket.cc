#include "server/worker/ticket.h"

#include "base/check.h"

namespace millrace::server {

const char* Name(TicketState state) {
  switch (state) {
    case TicketState::kOffered:
      return "offered";
    case TicketState::kGranted:
      return "granted";
    case TicketState::kStreaming:
      return "streaming";
    case TicketState::kSealed:
      return "sealed";
    case TicketState::kCommitted:
      return "committed";
    case TicketState::kAborting:
      return "aborting";
    case TicketState::kDrained:
      return "drained";
    case TicketState::kReleased:
      return "released";
  }
  return "unknown";
}

bool CanMove(TicketState from, TicketState to) {
  switch (from) {
    case TicketState::kOffered:
      return to == TicketState::kGranted || to == TicketState::kAborting;
    case TicketState::kGranted:
      return to == TicketState::kStreaming || to == TicketState::kAborting;
    case TicketState::kStreaming:
      return to == TicketState::kSealed || to == TicketState::kAborting;
    case TicketState::kSealed:
      return to == TicketState::kCommitted || to == TicketState::kAborting;
    case TicketState::kCommitted:
      return to == TicketState::kReleased;
    case TicketState::kAborting:
      return to == TicketState::kDrained;
    case TicketState::kDrained:
      return to == TicketState::kReleased;
    case TicketState::kReleased:
      return false;
  }
  return false;
}

Ticket::Ticket(TicketObserver* observer) : observer_(observer) { observer_->OnBegin(state_); }

Ticket::~Ticket() { MR_CHECK(released(), "a ticket ended as {}", Name(state_)); }

void Ticket::MoveTo(TicketState next) {
  MR_CHECK(CanMove(state_, next), "a ticket cannot go from {} to {}", Name(state_), Name(next));
  observer_->OnMove(state_, next);
  state_ = next;
}

}  // namespace millrace::server
