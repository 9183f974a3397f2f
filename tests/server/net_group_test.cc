// What is particular to ranks of several hosts: who is let in, garbage, and groups that were cut in two.
#include <boost/asio/io_context.hpp>
#include <boost/asio/ip/tcp.hpp>
#include <boost/asio/read.hpp>
#include <boost/asio/write.hpp>
#include <thread>

#include "proto/group.pb.h"
#include "tests/server/cut_proxy.h"
#include "tests/server/net_place.h"

namespace millrace::server {
namespace {

namespace group = ::millrace::group::v1;

using engine::GroupCase;
using engine::StartRank;

TEST(NetGroup, RefusesWhoDoesNotFit) {
  const GroupCase c;
  const auto addresses = FreeAddresses(2);
  const auto place = PlaceAt(addresses);
  const engine::RandomTensors source(11);
  StatusOr<engine::GroupRank> first = Unavailable("not yet");
  std::jthread starts([&] { first = StartRank(c, source, *place, 0, 2, 0); });
  GroupCase other = c;
  other.quantization = engine::Quantization::kInt8;
  const auto misfit = StartRank(other, source, *place, 1, 2, 0);
  EXPECT_EQ(misfit.status().code(), absl::StatusCode::kFailedPrecondition) << misfit.status();
  EXPECT_NE(Message(misfit.status()).find("weight format"), std::string::npos) << misfit.status();
  const auto second = StartRank(c, source, *place, 1, 2, 0);
  ASSERT_TRUE(second.ok()) << second.status();
  starts.join();
  ASSERT_TRUE(first.ok()) << first.status();
  const auto twice = StartRank(c, source, *place, 1, 2, 0);
  EXPECT_EQ(twice.status().code(), absl::StatusCode::kUnavailable) << twice.status();
  EXPECT_NE(Message(twice.status()).find(addresses[1].ToString()), std::string::npos) << twice.status();
}

// Whatever comes to the port, the group goes on.
TEST(NetGroup, GarbageIsNotTaken) {
  using boost::asio::ip::tcp;
  const GroupCase c;
  const auto addresses = FreeAddresses(2);
  const auto place = PlaceAt(addresses);
  const engine::RandomTensors source(11);
  StatusOr<engine::GroupRank> first = Unavailable("not yet");
  std::jthread starts([&] { first = StartRank(c, source, *place, 0, 2, 0); });
  const auto second = StartRank(c, source, *place, 1, 2, 0);
  ASSERT_TRUE(second.ok()) << second.status();
  starts.join();
  ASSERT_TRUE(first.ok()) << first.status();
  const uint32_t epoch = first->group->epoch();
  Random random(5);
  for (int i = 0; i < 60; ++i) {
    boost::asio::io_context io;
    tcp::socket socket(io);
    socket.connect({boost::asio::ip::make_address("127.0.0.1"), addresses[0].port});
    std::string garbage(random.Below(3000), '\0');
    for (char& byte : garbage) byte = static_cast<char>(random.Next());
    if (i % 3 == 0 && garbage.size() >= 4)
      garbage.replace(0, 4, std::string("\x05\0\0\0", 4));  // a length that can be
    if (i % 3 == 1) {
      group::GroupMessage message;  // well-formed, and no greeting or from nobody
      if (random.Below(2) == 0) {
        message.mutable_hello()->set_rank(static_cast<uint32_t>(random.Below(5)));
        message.mutable_hello()->set_version(2);
      } else {
        message.mutable_members()->set_epoch(1000);
      }
      const std::string body = message.SerializeAsString();
      const auto length = static_cast<uint32_t>(body.size());
      garbage = std::string(reinterpret_cast<const char*>(&length), sizeof(length)) + body;
    }
    boost::system::error_code error;
    boost::asio::write(socket, boost::asio::buffer(garbage), error);
    if (random.Below(2) == 0) socket.shutdown(tcp::socket::shutdown_send, error);
    char back[64];
    if (i % 3 == 1) {
      while (!error) boost::asio::read(socket, boost::asio::buffer(back), error);  // it hangs up
    }
  }
  EXPECT_EQ(first->group->epoch(), epoch);
  EXPECT_EQ(first->group->alive(), 3U);
  EXPECT_EQ(second->group->alive(), 3U);
}

// The way that rank 1 dials is cut in the middle of the work: their link goes on over another address of rank
// 0, with nothing lost, nothing twice, and nobody cast out. Where there is no other way, the rank is out as
// soon as that is certain.
TEST(NetGroup, ALinkGoesOnWhereItsWayIsCut) {
  const GroupCase c;
  const engine::RandomTensors source(11);
  constexpr int kSteps = 40;
  const auto expected = engine::Expected(c, source, 2, kSteps);
  for (const bool another_way : {true, true, true, false}) {
    const auto addresses = FreeAddresses(2);
    CutProxy way(addresses[0]);
    std::vector<std::string> rails = {"127.0.0.1:0"};
    if (another_way) rails.emplace_back("127.0.0.2:0");
    const auto place = PlaceAt(addresses, rails, {way.address(), addresses[1]});
    std::atomic<int> ended = 0;
    std::array<uint32_t, 2> epochs{};
    const auto run = [&](int number) {
      auto rank = StartRank(c, source, *place, number, 2, 0, {}, std::chrono::seconds(4));
      ASSERT_TRUE(rank.ok()) << rank.status();
      engine::GroupScript script(static_cast<uint64_t>(number) + 1, c.v2);
      for (int i = 0; i < kSteps; ++i) {
        if (number == 0 && i == 15) way.Cut();
        const StatusOr<uint64_t> digest = script.Next(*rank->backend);
        if (!another_way && number == 1 && !digest.ok()) return;  // cast out, as it must be
        ASSERT_TRUE(digest.ok()) << digest.status();
        ASSERT_EQ(*digest, expected[static_cast<size_t>(number)][static_cast<size_t>(i)]) << "step " << i;
      }
      epochs[static_cast<size_t>(number)] = rank->group->epoch();
      EXPECT_EQ(rank->group->alive(), another_way ? 3U : 1U << number);
      ++ended;
      const TimePoint until = Clock::System().Now() + std::chrono::seconds(60);
      while (another_way && ended < 2 && Clock::System().Now() < until) {
        if (rank->backend->JoinWanted()) {
          ASSERT_TRUE(rank->backend->Forward({}, {}).ok());
        }
        std::this_thread::sleep_for(std::chrono::microseconds(100));
      }
    };
    {
      std::jthread other(run, 1);
      run(0);
    }
    if (another_way) {
      EXPECT_EQ(epochs, (std::array<uint32_t, 2>{1, 1})) << "nobody was cast out";
    }
  }
}

// A connection that says nothing does not stay.
TEST(NetGroup, SilenceIsEnded) {
  using boost::asio::ip::tcp;
  const GroupCase c;
  const auto addresses = FreeAddresses(1);
  const auto place = PlaceAt(addresses);
  const engine::RandomTensors source(11);
  const auto rank = StartRank(c, source, *place, 0, 1, 0);
  ASSERT_TRUE(rank.ok()) << rank.status();
  boost::asio::io_context io;
  tcp::socket socket(io);
  socket.connect({boost::asio::ip::make_address("127.0.0.1"), addresses[0].port});
  const TimePoint begun = Clock::System().Now();
  boost::system::error_code error;
  char back[64];
  while (!error) boost::asio::read(socket, boost::asio::buffer(back), error);  // until it ends
  EXPECT_GT(Clock::System().Now() - begun, std::chrono::seconds(4));
}

TEST(NetGroup, SaysWhoIsMissing) {
  const auto place = PlaceAt(FreeAddresses(2));
  engine::RankGroupOptions options;
  options.shape = {.num_ranks = 2,
                   .num_layers = 1,
                   .num_experts = 4,
                   .experts_per_token = 2,
                   .hidden_size = 64,
                   .rows_max = 4,
                   .row_bytes = 64,
                   .digest = 1};
  options.held = {engine::InitialPlacement(4, 2, 0)};
  options.form_max = std::chrono::milliseconds(300);
  const auto alone = place->Join(options);
  EXPECT_EQ(alone.status().code(), absl::StatusCode::kDeadlineExceeded) << alone.status();
  EXPECT_NE(Message(alone.status()).find("rank 1 did not"), std::string::npos) << alone.status();
}

}  // namespace
}  // namespace millrace::server
