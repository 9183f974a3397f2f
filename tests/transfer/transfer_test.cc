// What holds on every kind of rail.
#include <sys/resource.h>

#include <algorithm>

#include "harness.h"

namespace millrace::transfer {
namespace {

constexpr size_t kMemory = 12 << 20;

class Conformance : public testing::TestWithParam<RailCase> {
 protected:
  void SetUp() override {
    if (!GetParam().skip.empty()) GTEST_SKIP() << GetParam().skip;
  }
  Options options_ = GetParam().skip.empty() ? GetParam().options : Options();
  static Options Receiver(Options options) {
    options.include = GetParam().receiver_include;
    return options;
  }
  Side sender_{options_, kMemory, true, 1};
  Side receiver_{Receiver(options_), kMemory, true, 2};
  PeerId peer_ = *sender_.transfer->Open(receiver_.transfer->Descriptor());

  TicketId Grant(uint64_t offset, uint64_t bytes) {
    return *receiver_.transfer->OpenTicket(sender_.transfer->epoch(), {{receiver_.region, offset, bytes}});
  }
};

TEST_P(Conformance, EverySizeArrivesWholeAndTouchesNothingElse) {
  const size_t slice = options_.slice_bytes_max;
  for (const size_t bytes :
       {size_t{1}, size_t{4095}, slice - 1, slice, slice + 1, 3 * slice + 17, size_t{8} << 20}) {
    std::fill(receiver_.memory.begin(), receiver_.memory.end(), std::byte{0xee});
    const TicketId ticket = Grant(1000, bytes);
    const Status status = SubmitAndWait(*sender_.transfer, peer_,
                                        OneIntent(ticket, sender_.region, 77, bytes, receiver_.region, 1000));
    ASSERT_TRUE(status.ok()) << status;
    CloseAndWait(*receiver_.transfer, ticket);
    ASSERT_TRUE(std::equal(sender_.memory.begin() + 77,
                           sender_.memory.begin() + 77 + static_cast<ptrdiff_t>(bytes),
                           receiver_.memory.begin() + 1000))
        << bytes;
    const auto untouched = [](std::byte b) { return b == std::byte{0xee}; };
    EXPECT_TRUE(std::all_of(receiver_.memory.begin(), receiver_.memory.begin() + 1000, untouched));
    EXPECT_TRUE(std::all_of(receiver_.memory.begin() + 1000 + static_cast<ptrdiff_t>(bytes),
                            receiver_.memory.end(), untouched));
  }
}

TEST_P(Conformance, ManyScatteredIntentsOfOneWrite) {
  std::vector<size_t> places(1000);
  for (size_t i = 0; i < places.size(); ++i) places[i] = i;
  Random random(5);
  for (size_t i = places.size() - 1; i > 0; --i) std::swap(places[i], places[random.Below(i + 1)]);
  const TicketId ticket = Grant(0, kMemory);
  Request request;
  request.ticket = ticket;
  for (size_t i = 0; i < places.size(); ++i) {
    request.intents.push_back({{sender_.region, i * 8192, 8000}, receiver_.region, places[i] * 8192});
  }
  const Status status = SubmitAndWait(*sender_.transfer, peer_, std::move(request));
  ASSERT_TRUE(status.ok()) << status;
  for (size_t i = 0; i < places.size(); ++i) {
    const auto from = sender_.memory.begin() + static_cast<ptrdiff_t>(i * 8192);
    ASSERT_TRUE(
        std::equal(from, from + 8000, receiver_.memory.begin() + static_cast<ptrdiff_t>(places[i] * 8192)))
        << i;
  }
}

TEST_P(Conformance, ReadsFetchExactlyWhatWasAskedFor) {
  const TicketId ticket = *receiver_.transfer->OpenTicket(
      sender_.transfer->epoch(), {{receiver_.region, 1000, 9 << 20}}, Operation::kRead);
  const size_t slice = options_.slice_bytes_max;
  for (const size_t bytes : {size_t{1}, size_t{4095}, slice, slice + 1, size_t{8} << 20}) {
    std::fill(sender_.memory.begin(), sender_.memory.end(), std::byte{0xee});
    const Status status = SubmitAndWait(*sender_.transfer, peer_,
                                        OneRead(ticket, sender_.region, 77, bytes, receiver_.region, 1000));
    ASSERT_TRUE(status.ok()) << status;
    ASSERT_TRUE(std::equal(receiver_.memory.begin() + 1000,
                           receiver_.memory.begin() + 1000 + static_cast<ptrdiff_t>(bytes),
                           sender_.memory.begin() + 77))
        << bytes;
    const auto untouched = [](std::byte b) { return b == std::byte{0xee}; };
    EXPECT_TRUE(std::all_of(sender_.memory.begin(), sender_.memory.begin() + 77, untouched));
    EXPECT_TRUE(std::all_of(sender_.memory.begin() + 77 + static_cast<ptrdiff_t>(bytes), sender_.memory.end(),
                            untouched));
  }
  const auto code = [&](Request request) {
    return SubmitAndWait(*sender_.transfer, peer_, std::move(request)).code();
  };
  EXPECT_EQ(code(OneRead(ticket, sender_.region, 0, 10, receiver_.region, 999)),
            absl::StatusCode::kPermissionDenied);
  EXPECT_EQ(code(OneIntent(ticket, sender_.region, 0, 10, receiver_.region, 1000)),
            absl::StatusCode::kPermissionDenied)
      << "a write under a ticket for reads";
  EXPECT_EQ(code(OneRead(Grant(0, 100), sender_.region, 0, 10, receiver_.region, 0)),
            absl::StatusCode::kPermissionDenied)
      << "a read under a ticket for writes";
  CloseAndWait(*receiver_.transfer, ticket);
  EXPECT_EQ(code(OneRead(ticket, sender_.region, 0, 10, receiver_.region, 1000)),
            absl::StatusCode::kPermissionDenied);
}

TEST_P(Conformance, StridesAndPreparedListsLandPieceByPiece) {
  // 100 pieces of 1,000 bytes, every 1,500 here and every 2,048 there, submitted twice from one list.
  Intent intent{{sender_.region, 10, 1000}, receiver_.region, 5, 100, 1500, 2048};
  auto list = sender_.transfer->Prepare({intent});
  ASSERT_TRUE(list.ok()) << list.status();
  EXPECT_EQ(sender_.transfer->Deregister(sender_.region).code(), absl::StatusCode::kFailedPrecondition);
  const TicketId ticket = Grant(0, kMemory);
  for (int round = 0; round < 2; ++round) {
    std::fill(receiver_.memory.begin(), receiver_.memory.end(), std::byte{0xee});
    Request request;
    request.ticket = ticket;
    request.prepared = *list;
    const Status status = SubmitAndWait(*sender_.transfer, peer_, std::move(request));
    ASSERT_TRUE(status.ok()) << status;
    for (ptrdiff_t i = 0; i < 100; ++i) {
      const auto from = sender_.memory.begin() + 10 + i * 1500;
      const auto to = receiver_.memory.begin() + 5 + i * 2048;
      ASSERT_TRUE(std::equal(from, from + 1000, to)) << i;
      EXPECT_TRUE(std::all_of(to + 1000, to + 2048, [](std::byte b) { return b == std::byte{0xee}; })) << i;
    }
  }
  intent.count = 1u << 31;
  intent.local_stride = UINT64_MAX / 2;
  EXPECT_EQ(sender_.transfer->Prepare({intent}).status().code(), absl::StatusCode::kInvalidArgument)
      << "strides around the end of numbers";
}

// The same places are written again and again with other bytes: nothing of an earlier request may come later.
TEST_P(Conformance, OverwritesKeepTheirOrder) {
  const TicketId ticket = Grant(0, 1 << 20);
  for (int round = 0; round < 50; ++round) {
    std::fill(sender_.memory.begin(), sender_.memory.begin() + (1 << 20), static_cast<std::byte>(round));
    ASSERT_TRUE(SubmitAndWait(*sender_.transfer, peer_,
                              OneIntent(ticket, sender_.region, 0, 1 << 20, receiver_.region, 0))
                    .ok());
    CloseAndWait(*receiver_.transfer, Grant(0, 1));  // orders this thread after the receiver's
    ASSERT_TRUE(std::all_of(receiver_.memory.begin(), receiver_.memory.begin() + (1 << 20),
                            [round](std::byte b) { return b == static_cast<std::byte>(round); }))
        << round;
  }
}

TEST_P(Conformance, BothDirectionsAtOnceFromManyThreads) {
  Side back(options_, 1 << 20, true, 9);
  const PeerId to_back = *receiver_.transfer->Open(back.transfer->Descriptor());
  const TicketId forth = Grant(0, kMemory);
  const TicketId other = *back.transfer->OpenTicket(receiver_.transfer->epoch(), {{back.region, 0, 1 << 20}});
  std::vector<std::thread> threads;
  for (int t = 0; t < 4; ++t) {
    threads.emplace_back([&, t] {
      for (int i = 0; i < 20; ++i) {
        const uint64_t at = static_cast<uint64_t>(t * 20 + i) * 10'000;
        EXPECT_TRUE(SubmitAndWait(*sender_.transfer, peer_,
                                  OneIntent(forth, sender_.region, at, 10'000, receiver_.region, at))
                        .ok());
        EXPECT_TRUE(SubmitAndWait(*receiver_.transfer, to_back,
                                  OneIntent(other, receiver_.region, kMemory - 5000, 5000, back.region, at))
                        .ok());
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_TRUE(std::equal(sender_.memory.begin(), sender_.memory.begin() + 800'000, receiver_.memory.begin()));
}

TEST_P(Conformance, WithoutARightTicketNothingLands) {
  const std::vector<std::byte> before = receiver_.memory;
  const TicketId mine = Grant(4096, 4096);
  const TicketId others =
      *receiver_.transfer->OpenTicket(sender_.transfer->epoch() + 1, {{receiver_.region, 0, kMemory}});
  const auto write = [&](TicketId ticket, uint64_t offset, uint64_t bytes) {
    return SubmitAndWait(*sender_.transfer, peer_,
                         OneIntent(ticket, sender_.region, 0, bytes, receiver_.region, offset))
        .code();
  };
  EXPECT_EQ(write(999, 4096, 100), absl::StatusCode::kPermissionDenied) << "unknown ticket";
  EXPECT_EQ(write(others, 4096, 100), absl::StatusCode::kPermissionDenied) << "another epoch's ticket";
  EXPECT_EQ(write(mine, 4095, 100), absl::StatusCode::kPermissionDenied) << "before the range";
  EXPECT_EQ(write(mine, 8000, 193), absl::StatusCode::kPermissionDenied) << "over its end";
  EXPECT_EQ(write(mine, UINT64_MAX - 10, 100), absl::StatusCode::kPermissionDenied)
      << "around the end of numbers";
  EXPECT_EQ(receiver_.memory, before);
  EXPECT_TRUE(receiver_.transfer->ExtendTicket(mine, {{receiver_.region, 8192, 4096}}).ok());
  EXPECT_EQ(write(mine, 8000, 193), absl::StatusCode::kOk) << "a further grant joins the first";
  CloseAndWait(*receiver_.transfer, mine);
  EXPECT_EQ(write(mine, 4096, 100), absl::StatusCode::kPermissionDenied) << "closed";
  CloseAndWait(*receiver_.transfer, others);
  EXPECT_EQ(receiver_.transfer->TakeSnapshot().open_tickets, 0);
}

TEST_P(Conformance, AClosedTicketsMemoryStaysAsItIs) {
  const TicketId ticket = Grant(0, 8 << 20);
  auto done = std::make_shared<std::promise<Status>>();
  ASSERT_TRUE(sender_.transfer
                  ->Submit(peer_, OneIntent(ticket, sender_.region, 0, 8 << 20, receiver_.region, 0),
                           [done](Status status) { done->set_value(std::move(status)); })
                  .ok());
  CloseAndWait(*receiver_.transfer, ticket);
  std::fill(receiver_.memory.begin(), receiver_.memory.end(), std::byte{0x55});
  const Status status = done->get_future().get();
  EXPECT_TRUE(status.ok() || status.code() == absl::StatusCode::kPermissionDenied) << status;
  EXPECT_TRUE(std::all_of(receiver_.memory.begin(), receiver_.memory.end(),
                          [](std::byte b) { return b == std::byte{0x55}; }));
}

TEST_P(Conformance, CancelledWritesLetGoOfTheirSource) {
  const TicketId ticket = Grant(0, kMemory);
  std::atomic<int> ended{0};
  for (int i = 0; i < 50; ++i) {
    ASSERT_TRUE(sender_.transfer
                    ->Submit(peer_, OneIntent(ticket, sender_.region, 0, 4 << 20, receiver_.region, 0),
                             [&ended](Status) { ++ended; })
                    .ok());
  }
  EXPECT_EQ(sender_.transfer->Deregister(sender_.region).code(), absl::StatusCode::kFailedPrecondition);
  auto fence = std::make_shared<std::promise<void>>();
  sender_.transfer->Cancel(peer_, ticket, [fence] { fence->set_value(); });
  ASSERT_EQ(fence->get_future().wait_for(std::chrono::seconds(10)), std::future_status::ready);
  EXPECT_EQ(ended, 50);
  EXPECT_TRUE(sender_.transfer->Deregister(sender_.region).ok());
}

TEST_P(Conformance, BadCallsAreRefusedByName) {
  const auto code = [&](Request request, PeerId peer) {
    return sender_.transfer->Submit(peer, std::move(request), [](Status) { FAIL(); }).code();
  };
  EXPECT_EQ(code(Request{}, peer_), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(code(OneIntent(1, sender_.region, 0, 0, 1, 0), peer_), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(code(OneIntent(1, sender_.region, kMemory - 1, 2, 1, 0), peer_),
            absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(code(OneIntent(1, 12345, 0, 1, 1, 0), peer_), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(code(OneIntent(1, sender_.region, 0, 1, 1, 0), 777), absl::StatusCode::kNotFound);
  EXPECT_EQ(sender_.transfer->Open("garbage").status().code(), absl::StatusCode::kInvalidArgument);
  std::vector<std::byte> fixed(100);
  const RegionId read_only = *sender_.transfer->Register(fixed, false);
  EXPECT_FALSE(sender_.transfer->OpenTicket(1, {{read_only, 0, 10}}).ok()) << "not writable";
  EXPECT_TRUE(sender_.transfer->OpenTicket(1, {{read_only, 0, 10}}, Operation::kRead).ok());
  EXPECT_EQ(code(OneRead(1, read_only, 0, 10, 1, 0), peer_), absl::StatusCode::kInvalidArgument)
      << "a read into a region that is not writable";
  EXPECT_FALSE(receiver_.transfer->OpenTicket(1, {{receiver_.region, kMemory, 1}}).ok()) << "outside";
  EXPECT_EQ(*sender_.transfer->Open(receiver_.transfer->Descriptor()), peer_)
      << "the same process is the same peer";
}

TEST_P(Conformance, ALostPeerFailsItsWritesAndIsForgotten) {
  Options options = options_;
  options.peer_timeout = std::chrono::milliseconds(300);
  options.heartbeat = std::chrono::milliseconds(50);
  Side sender(options, 1 << 20, false, 3);
  auto receiver = std::make_unique<Side>(options, 1 << 20, true, 4);
  const PeerId peer = *sender.transfer->Open(receiver->transfer->Descriptor());
  const TicketId ticket =
      *receiver->transfer->OpenTicket(sender.transfer->epoch(), {{receiver->region, 0, 1 << 20}});
  ASSERT_TRUE(
      SubmitAndWait(*sender.transfer, peer, OneIntent(ticket, sender.region, 0, 1000, receiver->region, 0))
          .ok());
  const RegionId region = receiver->region;
  receiver.reset();
  const Status status =
      SubmitAndWait(*sender.transfer, peer, OneIntent(ticket, sender.region, 0, 1 << 20, region, 0));
  EXPECT_TRUE(status.code() == absl::StatusCode::kUnavailable || status.code() == absl::StatusCode::kNotFound)
      << status;
  EXPECT_TRUE(Eventually([&] { return sender.transfer->TakeSnapshot().peers == 0; }));
  EXPECT_EQ(sender.transfer->TakeSnapshot().pending_requests, 0);
  EXPECT_TRUE(sender.transfer->Deregister(sender.region).ok());
}

// The peer goes while more waits than a path holds: what a path gives back as it breaks finds others waiting,
// and nothing is sent on it any more.
TEST_P(Conformance, APeerThatGoesWithMuchQueuedFailsAllOfIt) {
  Options options = options_;
  options.peer_timeout = std::chrono::milliseconds(300);
  options.heartbeat = std::chrono::milliseconds(50);
  for (int round = 0; round < 3; ++round) {
    Side sender(options, 32 << 20, false, 3);
    auto receiver = std::make_unique<Side>(options, 32 << 20, true, 4);
    const PeerId peer = *sender.transfer->Open(receiver->transfer->Descriptor());
    const TicketId ticket =
        *receiver->transfer->OpenTicket(sender.transfer->epoch(), {{receiver->region, 0, 32 << 20}});
    constexpr int kWrites = 800;
    constexpr uint64_t kBytes = 40000;
    std::atomic<int> ended = 0;
    for (uint64_t i = 0; i < kWrites; ++i) {
      ASSERT_TRUE(
          sender.transfer
              ->Submit(peer,
                       OneIntent(ticket, sender.region, i * kBytes, kBytes, receiver->region, i * kBytes),
                       [&ended](const Status&) { ++ended; })
              .ok());
    }
    while (ended == 0) std::this_thread::yield();
    receiver.reset();
    EXPECT_TRUE(Eventually([&] { return ended == kWrites; })) << ended;
    EXPECT_TRUE(Eventually([&] { return sender.transfer->TakeSnapshot().peers == 0; }));
    EXPECT_TRUE(sender.transfer->Deregister(sender.region).ok());
  }
}

INSTANTIATE_TEST_SUITE_P(Rails, Conformance, testing::ValuesIn(RailCases()),
                         [](const auto& instance) { return instance.param.name; });

TEST(Transfer, EveryRailCarriesItsShare) {
  Side sender(RailOptions(3), 8 << 20, false, 1);
  Side receiver(RailOptions(3), 8 << 20, true, 2);
  const PeerId peer = *sender.transfer->Open(receiver.transfer->Descriptor());
  const TicketId ticket =
      *receiver.transfer->OpenTicket(sender.transfer->epoch(), {{receiver.region, 0, 8 << 20}});
  for (int i = 0; i < 5; ++i) {
    ASSERT_TRUE(SubmitAndWait(*sender.transfer, peer,
                              OneIntent(ticket, sender.region, 0, 8 << 20, receiver.region, 0))
                    .ok());
  }
  int carrying = 0;
  uint64_t bytes = 0;
  for (const PathSnapshot& path : sender.transfer->TakeSnapshot().paths) {
    carrying += path.bytes_done > 0;
    bytes += path.bytes_done;
  }
  EXPECT_EQ(carrying, 3);
  EXPECT_GE(bytes, 5U * (8 << 20)) << "late slices may have been carried twice";
}

TEST(Transfer, UnequalNumbersOfRailsAreAllUsed) {
  Side sender(RailOptions(1), 4 << 20, false, 1);
  Side receiver(RailOptions(3), 4 << 20, true, 2);
  const PeerId peer = *sender.transfer->Open(receiver.transfer->Descriptor());
  const TicketId ticket =
      *receiver.transfer->OpenTicket(sender.transfer->epoch(), {{receiver.region, 0, 4 << 20}});
  ASSERT_TRUE(
      SubmitAndWait(*sender.transfer, peer, OneIntent(ticket, sender.region, 0, 4 << 20, receiver.region, 0))
          .ok());
  EXPECT_EQ(sender.memory, receiver.memory);
}

TEST(Transfer, AnUnreachablePeerIsLostWithinItsTimeout) {
  Options options = RailOptions(1);
  options.peer_timeout = std::chrono::milliseconds(200);
  Side sender(options, 1000, false, 1);
  std::string descriptor;
  {
    Side gone(RailOptions(1), 1000, true, 2);
    descriptor = gone.transfer->Descriptor();
  }
  const PeerId peer = *sender.transfer->Open(descriptor);
  const Status status = SubmitAndWait(*sender.transfer, peer, OneIntent(1, sender.region, 0, 1000, 1, 0));
  EXPECT_EQ(status.code(), absl::StatusCode::kUnavailable) << status;
}

TEST(Transfer, ADeadlineEndsAWriteThatCannotBeSent) {
  Options options = RailOptions(1);
  options.peer_timeout = std::chrono::seconds(20);
  Side sender(options, 1000, false, 1);
  std::string descriptor;
  {
    Side gone(RailOptions(1), 1000, true, 2);
    descriptor = gone.transfer->Descriptor();
  }
  const PeerId peer = *sender.transfer->Open(descriptor);
  Request request = OneIntent(1, sender.region, 0, 1000, 1, 0);
  request.deadline = Clock::System().Now() + std::chrono::milliseconds(50);
  EXPECT_EQ(SubmitAndWait(*sender.transfer, peer, std::move(request)).code(),
            absl::StatusCode::kDeadlineExceeded);
}

TEST(Transfer, AFullQueueIsAnAnswer) {
  Options options = RailOptions(1);
  options.queued_bytes_max = 1000;
  Side sender(options, 2000, false, 1);
  Side receiver(options, 2000, true, 2);
  const PeerId peer = *sender.transfer->Open(receiver.transfer->Descriptor());
  EXPECT_EQ(sender.transfer->Submit(peer, OneIntent(1, sender.region, 0, 1001, 1, 0), [](Status) { FAIL(); })
                .code(),
            absl::StatusCode::kResourceExhausted);
  EXPECT_TRUE(sender.transfer->Deregister(sender.region).ok()) << "a refused write holds nothing";
}

TEST(Transfer, ARailThatCannotBeListenedOnIsNamed) {
  Options options;
  options.listen = {"203.0.113.7:0"};  // not an address of this host
  const auto failed = Transfer::Create(options);
  ASSERT_FALSE(failed.ok());
  EXPECT_NE(Message(failed.status()).find("203.0.113.7"), std::string_view::npos);
}

TEST(Transfer, IdlesWithoutUsingTheProcessor) {
  Side sender(RailOptions(2), 1000, false, 1);
  Side receiver(RailOptions(2), 1000, true, 2);
  const PeerId peer = *sender.transfer->Open(receiver.transfer->Descriptor());
  const TicketId ticket =
      *receiver.transfer->OpenTicket(sender.transfer->epoch(), {{receiver.region, 0, 1000}});
  ASSERT_TRUE(
      SubmitAndWait(*sender.transfer, peer, OneIntent(ticket, sender.region, 0, 1000, receiver.region, 0))
          .ok());
  const auto cpu_seconds = [] {
    rusage usage{};
    getrusage(RUSAGE_SELF, &usage);
    return static_cast<double>(usage.ru_utime.tv_sec + usage.ru_stime.tv_sec) +
           static_cast<double>(usage.ru_utime.tv_usec + usage.ru_stime.tv_usec) * 1e-6;
  };
  const double before = cpu_seconds();
  std::this_thread::sleep_for(std::chrono::milliseconds(500));
  EXPECT_LT(cpu_seconds() - before, 0.02) << "two connected engines, half a second";
}

TEST(PieceDigest, SumsAreTheSameInAnyOrderButNotForSwappedPieces) {
  const auto a = RandomBytes(1000, 1);
  const auto b = RandomBytes(1000, 2);
  EXPECT_EQ(PieceDigest(a, 0) + PieceDigest(b, 1), PieceDigest(b, 1) + PieceDigest(a, 0));
  EXPECT_NE(PieceDigest(a, 0) + PieceDigest(b, 1), PieceDigest(a, 1) + PieceDigest(b, 0));
}

}  // namespace
}  // namespace millrace::transfer
