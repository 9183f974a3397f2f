#pragma once
// The states of a ticket: one transfer of one prompt's KV between two workers. Both sides keep one, each its
// own.

#include <cstdint>

namespace millrace::server {

enum class TicketState {
  kOffered,    // D sent Start; P took it
  kGranted,    // the first destination pages are reserved and the ticket is open (D), known (P)
  kStreaming,  // bytes may be landing
  kSealed,     // P stated what it wrote, every piece acknowledged
  kCommitted,  // D found it all as stated; P may forget it
  kAborting,   // failed or cancelled: no new slice, earlier ones may still touch memory
  kDrained,    // no slice can touch memory any more
  kReleased,   // the engine's ticket hold on the pages is gone
};
inline constexpr int kTicketStates = 8;

const char* Name(TicketState state);

// Whether a ticket may go from one state to the other. Pure.
bool CanMove(TicketState from, TicketState to);

// Hears of every change, so that tickets can be counted by state. Outlives the tickets.
class TicketObserver {
 public:
  virtual ~TicketObserver() = default;
  virtual void OnBegin(TicketState state) = 0;
  virtual void OnMove(TicketState from, TicketState to) = 0;
};

// Not thread-safe. A step that the table does not allow, and an end before kReleased, are programmer's
// errors: pages would be lost or, worse, free while somebody writes to them.
class Ticket {
 public:
  explicit Ticket(TicketObserver* observer);
  ~Ticket();
  Ticket(const Ticket&) = delete;
  Ticket& operator=(const Ticket&) = delete;

  TicketState state() const { return state_; }
  void MoveTo(TicketState next);
  bool aborted() const { return state_ == TicketState::kAborting || state_ == TicketState::kDrained; }
  bool released() const { return state_ == TicketState::kReleased; }

 private:
  TicketObserver* const observer_;
  TicketState state_ = TicketState::kOffered;
};

}  // namespace millrace::server
