#include "server/worker/ticket.h"

#include <gtest/gtest.h>

#include <map>
#include <set>
#include <vector>

namespace millrace::server {
namespace {

using S = TicketState;

class Counting : public TicketObserver {
 public:
  void OnBegin(S state) override { ++by_state[state]; }
  void OnMove(S from, S to) override { --by_state[from], ++by_state[to]; }
  std::map<S, int> by_state;
};

TEST(Ticket, MovesOnlyAsTheTableSays) {
  const std::set<std::pair<S, S>> legal = {
      {S::kOffered, S::kGranted},  {S::kGranted, S::kStreaming},  {S::kStreaming, S::kSealed},
      {S::kSealed, S::kCommitted}, {S::kCommitted, S::kReleased}, {S::kOffered, S::kAborting},
      {S::kGranted, S::kAborting}, {S::kStreaming, S::kAborting}, {S::kSealed, S::kAborting},
      {S::kAborting, S::kDrained}, {S::kDrained, S::kReleased},
  };
  for (int from = 0; from < kTicketStates; ++from) {
    for (int to = 0; to < kTicketStates; ++to) {
      const auto a = static_cast<S>(from), b = static_cast<S>(to);
      EXPECT_EQ(CanMove(a, b), legal.contains({a, b})) << Name(a) << " to " << Name(b);
    }
  }
}

TEST(Ticket, TellsItsObserverOfEveryState) {
  Counting counting;
  {
    Ticket ticket(&counting);
    EXPECT_EQ(counting.by_state[S::kOffered], 1);
    for (const S next : {S::kGranted, S::kStreaming, S::kAborting}) ticket.MoveTo(next);
    EXPECT_TRUE(ticket.aborted());
    EXPECT_EQ(counting.by_state[S::kAborting], 1);
    ticket.MoveTo(S::kDrained);
    ticket.MoveTo(S::kReleased);
    EXPECT_TRUE(ticket.released());
  }
  EXPECT_EQ(counting.by_state[S::kReleased], 1);
  EXPECT_EQ(counting.by_state[S::kOffered], 0);
}

TEST(TicketDeathTest, IllegalStepsAndLostTicketsEndTheProcess) {
  Counting counting;
  EXPECT_DEATH({ Ticket(&counting).MoveTo(S::kSealed); }, "cannot go from offered to sealed");
  EXPECT_DEATH({ Ticket ticket(&counting); }, "a ticket ended as offered");
}

}  // namespace
}  // namespace millrace::server
