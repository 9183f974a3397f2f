// A thousand tickets, each ended at some moment of its transfer by its owner, by the submitter, by both, or
// by nobody: nothing may change memory after its fence, and everything that was held is free again.
#include <algorithm>
#include <atomic>

#include "harness.h"

namespace millrace::transfer {
namespace {

constexpr int kTickets = 1000;
constexpr int kAtOnce = 8;
constexpr size_t kPlace = 384 << 10;  // of each ticket that is open

class AbortStorm : public testing::TestWithParam<RailCase> {};

// One ticket's life in one place of the receiver's memory.
void RunTicket(Side& sender, Side& receiver, PeerId peer, size_t place, Random& random) {
  const size_t offset = place * kPlace;
  const size_t bytes = 1 + random.Below(kPlace);
  const Operation operation = random.Below(3) == 0 ? Operation::kRead : Operation::kWrite;
  const TicketId ticket =
      *receiver.transfer->OpenTicket(sender.transfer->epoch(), {{receiver.region, offset, bytes}}, operation);
  Request request = OneIntent(ticket, sender.region, offset, bytes, receiver.region, offset);
  request.operation = operation;
  auto ended = std::make_shared<std::promise<Status>>();
  auto end = ended->get_future();
  ASSERT_TRUE(
      sender.transfer
          ->Submit(peer, std::move(request), [ended](Status status) { ended->set_value(std::move(status)); })
          .ok());
  std::this_thread::sleep_for(std::chrono::microseconds(random.Below(400)));
  const uint64_t who = random.Below(4);
  if ((who & 1) != 0) {
    auto cancelled = std::make_shared<std::promise<void>>();
    auto done = cancelled->get_future();
    sender.transfer->Cancel(peer, ticket, [cancelled] { cancelled->set_value(); });
    if ((who & 2) != 0) CloseAndWait(*receiver.transfer, ticket);
    ASSERT_EQ(done.wait_for(std::chrono::seconds(30)), std::future_status::ready);
  } else if ((who & 2) == 0) {
    ASSERT_EQ(end.wait_for(std::chrono::seconds(30)), std::future_status::ready);
  }
  CloseAndWait(*receiver.transfer, ticket);
  const auto memory = std::span(receiver.memory).subspan(offset, bytes);
  std::fill(memory.begin(), memory.end(), static_cast<std::byte>(place));
  ASSERT_EQ(end.wait_for(std::chrono::seconds(30)), std::future_status::ready);
  const Status status = end.get();
  EXPECT_TRUE(status.ok() || absl::IsCancelled(status) || absl::IsPermissionDenied(status)) << status;
  EXPECT_TRUE(std::all_of(memory.begin(), memory.end(), [place](std::byte b) {
    return b == static_cast<std::byte>(place);
  })) << "memory changed after its fence";
}

TEST_P(AbortStorm, EverythingIsFreeAfterwards) {
  if (!GetParam().skip.empty()) GTEST_SKIP() << GetParam().skip;
  Side sender(GetParam().options, kAtOnce * kPlace, true, 1);
  Side receiver(GetParam().options, kAtOnce * kPlace, true, 2);
  const PeerId peer = *sender.transfer->Open(receiver.transfer->Descriptor());
  const uint64_t seed = RandomId();
  SCOPED_TRACE(fmt::format("seed {}", seed));
  std::vector<std::thread> threads;
  for (size_t place = 0; place < kAtOnce; ++place) {
    threads.emplace_back([&, place] {
      Random random(seed + place);
      for (int i = 0; i < kTickets / kAtOnce && !testing::Test::HasFailure(); ++i)
        RunTicket(sender, receiver, peer, place, random);
    });
  }
  for (std::thread& thread : threads) thread.join();
  const Snapshot owner = receiver.transfer->TakeSnapshot();
  EXPECT_EQ(owner.open_tickets, 0);
  EXPECT_EQ(owner.draining_tickets, 0);
  EXPECT_EQ(sender.transfer->TakeSnapshot().pending_requests, 0);
  for (const PathSnapshot& path : sender.transfer->TakeSnapshot().paths) EXPECT_EQ(path.bytes_in_flight, 0U);
  EXPECT_TRUE(receiver.transfer->Deregister(receiver.region).ok());
  EXPECT_TRUE(sender.transfer->Deregister(sender.region).ok());
}

INSTANTIATE_TEST_SUITE_P(, AbortStorm, testing::ValuesIn(RailCases()),
                         [](const auto& test) { return test.param.name; });

}  // namespace
}  // namespace millrace::transfer
