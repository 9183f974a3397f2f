// Whole engines over RDMA rails of the fake fabric: what no adapter can be made to do. Two rails, a0-b0 and
// a1-b1; the sender owns a*, the receiver b*.
#include <gtest/gtest.h>

#include <algorithm>

#include "../harness.h"
#include "fake_verbs.h"
#include "transfer/rdma/rdma_rails.h"

namespace millrace::transfer {
namespace {

using rdma::FakeFabric;

constexpr size_t kMemory = 8 << 20;

Options RdmaOptions(const char* include) {
  Options options = RailOptions(1);
  options.kinds = {"rdma"};
  options.include = {include};
  return options;
}

class RdmaRailsTest : public testing::Test {
 protected:
  void SetUp() override {
    rdma::ReplaceSystemVerbs(fabric_.verbs());
    Begin();
  }
  void TearDown() override {
    sender_.reset();
    receiver_.reset();
    rdma::ReplaceSystemVerbs(nullptr);
    EXPECT_EQ(fabric_.live(), 0) << fabric_.live_text();
  }
  void Begin() {
    sender_ = std::make_unique<Side>(RdmaOptions("a*"), kMemory, true, 1);
    receiver_ = std::make_unique<Side>(RdmaOptions("b*"), kMemory, true, 2);
    peer_ = *sender_->transfer->Open(receiver_->transfer->Descriptor());
  }
  TicketId Grant(Operation operation = Operation::kWrite) {
    return *receiver_->transfer->OpenTicket(sender_->transfer->epoch(), {{receiver_->region, 0, kMemory}},
                                            operation);
  }
  Status Write(TicketId ticket, uint64_t bytes = kMemory) {
    return SubmitAndWait(*sender_->transfer, peer_,
                         OneIntent(ticket, sender_->region, 0, bytes, receiver_->region, 0));
  }
  void ExpectWritten(uint64_t bytes = kMemory) {
    EXPECT_TRUE(std::equal(sender_->memory.begin(), sender_->memory.begin() + static_cast<ptrdiff_t>(bytes),
                           receiver_->memory.begin()));
  }
  bool Up(const std::string& rail) {
    for (const PathSnapshot& path : sender_->transfer->TakeSnapshot().paths) {
      if (path.local_rail == rail && path.kind == "rdma") return path.state == "up";
    }
    return false;
  }
  bool BothUp() {
    return Eventually([this] { return Up("a0") && Up("a1"); });
  }
  uint64_t Trips(const std::string& rail) {
    for (const PathSnapshot& path : sender_->transfer->TakeSnapshot().paths) {
      if (path.local_rail == rail && path.kind == "rdma") return path.trips;
    }
    return 0;
  }

  FakeFabric fabric_{{"a0", "a1", "b0", "b1"}};
  std::unique_ptr<Side> sender_, receiver_;
  PeerId peer_ = 0;
};

TEST(PairRails, JoinsWhatSharesANetworkAndUsesEveryRail) {
  const auto gid = [](uint8_t network, uint8_t host) {
    return std::array<uint8_t, 16>{0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, 10, 77, network, host};
  };
  using Pairs = std::vector<std::pair<size_t, size_t>>;
  EXPECT_EQ(rdma::PairRails({gid(0, 1), gid(1, 1)}, {gid(1, 2), gid(0, 2)}), (Pairs{{0, 1}, {1, 0}}));
  EXPECT_EQ(rdma::PairRails({gid(0, 1)}, {gid(1, 2), gid(0, 2)}), (Pairs{{0, 0}, {0, 1}}));
  EXPECT_EQ(rdma::PairRails({gid(0, 1), gid(1, 1), gid(2, 1)}, {gid(9, 2)}), (Pairs{{0, 0}, {1, 0}, {2, 0}}));
  EXPECT_TRUE(rdma::PairRails({}, {gid(0, 1)}).empty());
}

TEST_F(RdmaRailsTest, BothRailsCarryWritesAndReads) {
  ASSERT_TRUE(BothUp());
  const TicketId ticket = Grant();
  ASSERT_TRUE(Write(ticket).ok());
  ExpectWritten();
  CloseAndWait(*receiver_->transfer, ticket);
  EXPECT_GT(fabric_.bytes_written("a0"), kMemory / 10);
  EXPECT_GT(fabric_.bytes_written("a1"), kMemory / 10);
  // A copy that a later one overtook is not counted.
  EXPECT_GE(receiver_->transfer->TakeSnapshot().bytes_received, kMemory / 2);
  const TicketId reading = Grant(Operation::kRead);
  std::fill(sender_->memory.begin(), sender_->memory.end(), std::byte{0});
  const Status status = SubmitAndWait(*sender_->transfer, peer_,
                                      OneRead(reading, sender_->region, 0, kMemory, receiver_->region, 0));
  ASSERT_TRUE(status.ok()) << status;
  ExpectWritten();
  EXPECT_LT(Seconds(CloseAndWait(*receiver_->transfer, reading)), 0.15)
      << "the end of a read gives its lease back";
}

TEST_F(RdmaRailsTest, ACompletionThatNeverComesCostsARailNotTheWrite) {
  ASSERT_TRUE(BothUp());
  for (int i = 0; i < 3; ++i) {
    const TicketId ticket = Grant();
    fabric_.SetWire("a0", FakeFabric::Wire::kBlack);
    const Status status = Write(ticket);
    ASSERT_TRUE(status.ok()) << status;
    ExpectWritten();
    CloseAndWait(*receiver_->transfer, ticket);
    fabric_.SetWire("a0", FakeFabric::Wire::kGood);
    EXPECT_TRUE(BothUp()) << "the rail comes back";
  }
  EXPECT_EQ(fabric_.queue_pairs("a0"), 2) << "on the same queue pairs";
}

TEST_F(RdmaRailsTest, LateCompletionsAfterGivingUpAreHarmless) {
  ASSERT_TRUE(BothUp());
  const TicketId ticket = Grant();
  fabric_.HoldCompletions("a0", true);
  const Status status = Write(ticket);
  ASSERT_TRUE(status.ok()) << status;
  ExpectWritten();
  fabric_.HoldCompletions("a0", false);
  EXPECT_TRUE(BothUp());
  EXPECT_TRUE(Write(ticket).ok());
}

TEST_F(RdmaRailsTest, WhatIsInTheNetworkWhenATicketClosesNeverLands) {
  ASSERT_TRUE(BothUp());
  const TicketId ticket = Grant();
  // The leases are given, then the writes are stuck in the network on one rail.
  fabric_.HoldCompletions("a0", true);
  fabric_.SetWire("a0", FakeFabric::Wire::kHold);
  ASSERT_TRUE(Write(ticket).ok());
  ExpectWritten();
  EXPECT_LT(Seconds(CloseAndWait(*receiver_->transfer, ticket)), 1.0);
  std::fill(receiver_->memory.begin(), receiver_->memory.end(), std::byte{0x55});
  fabric_.SetWire("a0", FakeFabric::Wire::kGood);
  fabric_.HoldCompletions("a0", false);
  EXPECT_TRUE(BothUp());
  EXPECT_TRUE(std::all_of(receiver_->memory.begin(), receiver_->memory.end(),
                          [](std::byte byte) { return byte == std::byte{0x55}; }));
}

TEST_F(RdmaRailsTest, CloseTicketIsBoundedWhenEveryRailIsStuck) {
  ASSERT_TRUE(BothUp());
  const TicketId ticket = Grant();
  ASSERT_TRUE(Write(ticket, 1 << 20).ok());
  auto done = std::make_shared<std::promise<Status>>();
  fabric_.SetWire("a0", FakeFabric::Wire::kHold);
  fabric_.SetWire("a1", FakeFabric::Wire::kHold);
  ASSERT_TRUE(sender_->transfer
                  ->Submit(peer_, OneIntent(ticket, sender_->region, 0, kMemory, receiver_->region, 0),
                           [done](Status status) { done->set_value(std::move(status)); })
                  .ok());
  std::this_thread::sleep_for(std::chrono::milliseconds(5));
  EXPECT_LT(Seconds(CloseAndWait(*receiver_->transfer, ticket)), 1.0);
  std::fill(receiver_->memory.begin(), receiver_->memory.end(), std::byte{0x55});
  fabric_.SetWire("a0", FakeFabric::Wire::kGood);
  fabric_.SetWire("a1", FakeFabric::Wire::kGood);
  EXPECT_EQ(done->get_future().get().code(), absl::StatusCode::kPermissionDenied);
  EXPECT_TRUE(std::all_of(receiver_->memory.begin(), receiver_->memory.end(),
                          [](std::byte byte) { return byte == std::byte{0x55}; }));
}

TEST_F(RdmaRailsTest, EveryErrorCompletionIsSurvived) {
  for (const ibv_wc_status bad :
       {IBV_WC_LOC_QP_OP_ERR, IBV_WC_LOC_PROT_ERR, IBV_WC_REM_ACCESS_ERR, IBV_WC_REM_OP_ERR,
        IBV_WC_RETRY_EXC_ERR, IBV_WC_RNR_RETRY_EXC_ERR, IBV_WC_FATAL_ERR}) {
    ASSERT_TRUE(BothUp());
    const uint64_t trips = Trips("a0");
    fabric_.FailNextData("a0", bad);
    const TicketId ticket = Grant();
    const Status status = Write(ticket);
    ASSERT_TRUE(status.ok()) << status;
    ExpectWritten();
    CloseAndWait(*receiver_->transfer, ticket);
    // On a busy machine late slices add outages of their own, so that "one for all flushes" cannot be counted
    // here.
    EXPECT_GE(Trips("a0"), trips + 1) << "status " << bad;
  }
}

TEST_F(RdmaRailsTest, PortEventsAreLevelsAndOneOutage) {
  ASSERT_TRUE(BothUp());
  const TicketId ticket = Grant();
  for (int i = 0; i < 3; ++i) {
    fabric_.SetPort("a0", false);
    EXPECT_TRUE(Eventually([this] { return !Up("a0"); }));
    ASSERT_TRUE(Write(ticket).ok());
    fabric_.SetPort("a0", true);
    EXPECT_TRUE(BothUp());
  }
  EXPECT_GE(Trips("a0"), 3U);
  fabric_.SetPort("b1", false);  // the peer's end: told by its side of the link
  EXPECT_TRUE(Eventually([this] { return !Up("a1"); }));
  ASSERT_TRUE(Write(ticket).ok());
  fabric_.SetPort("b1", true);
  EXPECT_TRUE(BothUp());
  ExpectWritten();
}

TEST_F(RdmaRailsTest, AsynchronousFailuresOfQueuesAreSurvived) {
  ASSERT_TRUE(BothUp());
  const TicketId ticket = Grant();
  for (const char* const device : {"a0", "b0"}) {
    for (const ibv_event_type type : {IBV_EVENT_QP_FATAL, IBV_EVENT_QP_ACCESS_ERR, IBV_EVENT_GID_CHANGE}) {
      fabric_.SendEvent(device, type);
      ASSERT_TRUE(Write(ticket).ok());
      EXPECT_TRUE(BothUp());
    }
    fabric_.OverrunCq(device);
    ASSERT_TRUE(Write(ticket).ok());
    EXPECT_TRUE(BothUp());
  }
  ExpectWritten();
}

TEST_F(RdmaRailsTest, ALostDeviceIsLeftAloneAndTheOthersCarryOn) {
  ASSERT_TRUE(BothUp());
  const TicketId ticket = Grant();
  fabric_.SendEvent("a0", IBV_EVENT_DEVICE_FATAL);
  EXPECT_TRUE(Eventually([this] { return !Up("a0"); }));
  ASSERT_TRUE(Write(ticket).ok());
  ExpectWritten();
  EXPECT_TRUE(Up("a1"));
}

TEST_F(RdmaRailsTest, AFullSendQueueIsWaitedFor) {
  ASSERT_TRUE(BothUp());
  const TicketId ticket = Grant();
  fabric_.FailCall("post_send", 5, ENOMEM);
  std::thread healer([this] {
    std::this_thread::sleep_for(std::chrono::milliseconds(4));
    fabric_.Heal();
  });
  const Status status = Write(ticket, 1 << 20);
  healer.join();
  ASSERT_TRUE(status.ok()) << status;
  ExpectWritten(1 << 20);
  // No room is no outage. (On a busy machine late slices may be one: that is another matter.)
  for (const PathSnapshot& path : sender_->transfer->TakeSnapshot().paths)
    EXPECT_EQ(path.reason.find("cannot"), std::string::npos) << path.reason;
}

TEST_F(RdmaRailsTest, WhatCannotBeMadeNowIsMadeLater) {
  for (const char* const call : {"create_comp_channel", "create_cq", "create_qp", "modify_qp", "post_recv"}) {
    sender_.reset();
    receiver_.reset();
    EXPECT_EQ(fabric_.live(), 0) << fabric_.live_text();
    fabric_.FailCall(call, 3, ENOMEM);
    std::thread healer([this] {
      std::this_thread::sleep_for(std::chrono::milliseconds(50));
      fabric_.Heal();
    });
    Begin();
    const Status status = Write(Grant(), 1 << 20);
    healer.join();
    ASSERT_TRUE(status.ok()) << call << ": " << status;
    ExpectWritten(1 << 20);
    EXPECT_TRUE(BothUp()) << call;
  }
}

TEST_F(RdmaRailsTest, ARegionThatCannotBeRegisteredTakesItsDeviceOutOfServiceUntilItGoes) {
  ASSERT_TRUE(BothUp());
  std::vector<std::byte> more(1 << 16);
  fabric_.FailCall("reg_mr", 2, ENOMEM);  // on one device of the two
  const RegionId region = *sender_->transfer->Register(more, false);
  fabric_.Heal();
  EXPECT_TRUE(Eventually([this] { return Up("a0") != Up("a1"); }));
  ASSERT_TRUE(Write(Grant()).ok());
  const auto paths = sender_->transfer->TakeSnapshot().paths;
  EXPECT_TRUE(std::any_of(paths.begin(), paths.end(), [](const PathSnapshot& path) {
    return path.reason.find("cannot be registered") != std::string::npos;
  })) << "the reason can be read";
  ASSERT_TRUE(sender_->transfer->Deregister(region).ok());
  EXPECT_TRUE(BothUp());
}

TEST_F(RdmaRailsTest, APeerThatDiesTakesItsTargetsWithIt) {
  ASSERT_TRUE(BothUp());
  Grant();
  const TicketId ticket = Grant();
  ASSERT_TRUE(Write(ticket).ok());
  sender_.reset();  // its links are at the receiver still
  EXPECT_TRUE(Eventually([this] { return fabric_.queue_pairs("b0") == 0 && fabric_.queue_pairs("b1") == 0; },
                         std::chrono::seconds(15)));
  EXPECT_LT(Seconds(CloseAndWait(*receiver_->transfer, ticket)), 0.5);
}

TEST_F(RdmaRailsTest, TicketsAbortedAtRandomUnderFaultsLeaveNothing) {
  ASSERT_TRUE(BothUp());
  const uint64_t seed = RandomId();
  SCOPED_TRACE(fmt::format("seed {}", seed));
  Random random(seed);
  for (int i = 0; i < 60; ++i) {
    const TicketId ticket = Grant();
    auto done = std::make_shared<std::promise<Status>>();
    const auto bytes = 1 + random.Below(kMemory);
    ASSERT_TRUE(sender_->transfer
                    ->Submit(peer_, OneIntent(ticket, sender_->region, 0, bytes, receiver_->region, 0),
                             [done](Status status) { done->set_value(std::move(status)); })
                    .ok());
    const std::string rail = random.Below(2) == 0 ? "a0" : "a1";
    switch (random.Below(5)) {
      case 0:
        fabric_.FailNextData(rail, IBV_WC_RETRY_EXC_ERR);
        break;
      case 1:
        fabric_.SetWire(rail, FakeFabric::Wire::kHold);
        break;
      case 2:
        fabric_.SendEvent(rail, IBV_EVENT_QP_FATAL);
        break;
      default:
        break;
    }
    std::this_thread::sleep_for(std::chrono::microseconds(random.Below(2000)));
    CloseAndWait(*receiver_->transfer, ticket);
    fabric_.SetWire(rail, FakeFabric::Wire::kGood);
    const Status status = done->get_future().get();
    EXPECT_TRUE(status.ok() || status.code() == absl::StatusCode::kPermissionDenied) << status;
  }
  EXPECT_EQ(receiver_->transfer->TakeSnapshot().open_tickets, 0);
  EXPECT_EQ(receiver_->transfer->TakeSnapshot().draining_tickets, 0);
  EXPECT_TRUE(BothUp());
}

// Links are numbered from 1, so another peer's number is easily said.
TEST(RdmaControl, APeerSpeaksForItsOwnLinksAlone) {
  struct Channel : ControlChannel {
    bool SendMessage(const std::string&, const std::string& body) override {
      return sent.ParseFromString(body);
    }
    uint64_t peer_epoch() const override { return 6; }
    rdma::v1::Message sent;
  };
  struct Owner : PathOwner {
    void OnConnected(Path*) override {}
    void OnBroken(Path* path, const Status&) override {
      ++broken;
      path->Disconnect();
    }
    void OnSliceDone(Path*, uint64_t, SliceOutcome) override {}
    void OnProbeDone(Path*, uint64_t) override {}
    void OnRefused(const Status&) override {}
    int broken = 0;
  };
  FakeFabric fabric({"a0"});
  {
    auto loop = *EventLoop::Create();
    const Options options = RdmaOptions("a*");
    RailEnvironment environment;
    environment.loop = loop.get();
    environment.clock = &Clock::System();
    environment.options = &options;
    rdma::RdmaRails rails(environment, fabric.verbs());
    ASSERT_TRUE(rails.Start().ok());
    Channel peer, other;
    Owner owner;
    auto paths = rails.MakePaths({6, "peer", {{"rdma", rails.Addresses()[0].address}}}, &peer);
    ASSERT_TRUE(paths.ok()) << paths.status();
    (*paths)[0]->Attach(&owner);
    (*paths)[0]->Connect();
    rdma::v1::Message refusal, end;
    refusal.mutable_accept()->set_link(peer.sent.connect().link());
    refusal.mutable_accept()->set_generation(peer.sent.connect().generation());
    refusal.mutable_accept()->set_refusal("no");
    end.mutable_broken()->set_link(peer.sent.connect().link());
    end.mutable_broken()->set_generation(peer.sent.connect().generation());
    rails.OnControl(&other, refusal.SerializeAsString());
    rails.OnControl(&other, end.SerializeAsString());
    EXPECT_EQ(owner.broken, 0);
    rails.OnControl(&peer, refusal.SerializeAsString());
    EXPECT_EQ(owner.broken, 1);
  }
  EXPECT_EQ(fabric.live(), 0) << fabric.live_text();
}

TEST(RdmaAskedFor, IsRefusedByNameWhereThereIsNone) {
  FakeFabric fabric({"a0"});
  rdma::ReplaceSystemVerbs(fabric.verbs());
  Options options = RdmaOptions("nothing*");
  const auto transfer = Transfer::Create(options);
  EXPECT_EQ(transfer.status().code(), absl::StatusCode::kNotFound) << transfer.status();
  options.kinds.clear();
  EXPECT_TRUE(Transfer::Create(options).ok()) << "not asked for by name: other kinds do";
  rdma::ReplaceSystemVerbs(nullptr);
  EXPECT_EQ(fabric.live(), 0) << fabric.live_text();
}

}  // namespace
}  // namespace millrace::transfer
