// What a link promises, over connections that come and go at every point.
#include "server/group/rank_link.h"

#include <gtest/gtest.h>

#include <boost/asio/io_context.hpp>

#include "base/random.h"

namespace millrace::server {
namespace {

using boost::asio::ip::tcp;

constexpr uint64_t kSession = 7;

struct Side {
  RankLink link{kSession};
  uint64_t said = 0;
  uint64_t heard = 0;
  bool over = false;

  void Say() {
    group::GroupMessage message;
    message.mutable_beat()->set_beat(++said);
    message.mutable_beat()->set_taken(link.taken());
    link.Send(message);
  }
  void Start(const std::shared_ptr<RankConnection>& connection) {
    connection->Start(
        [this, raw = connection.get()](const group::GroupMessage& message) {
          if (!link.Uses(raw) || !link.Take(Clock::System().Now())) return;
          ASSERT_EQ(message.beat().beat(), ++heard) << "once, and in order";
          ASSERT_TRUE(link.Acknowledge(message.beat().taken()));
        },
        [this, raw = connection.get()](const std::string& why, bool by_peer) {
          over |= link.Ended(raw, why, by_peer);
        });
  }
};

class RankLinkTest : public ::testing::Test {
 protected:
  std::pair<std::shared_ptr<RankConnection>, std::shared_ptr<RankConnection>> Connect() {
    tcp::acceptor acceptor(io_, {boost::asio::ip::make_address("127.0.0.1"), 0});
    tcp::socket dials(io_);
    dials.connect(acceptor.local_endpoint());
    tcp::socket answers = acceptor.accept();
    return {std::make_shared<RankConnection>(std::move(dials)),
            std::make_shared<RankConnection>(std::move(answers))};
  }
  // The link's first connection. Returns a_'s end of it.
  std::shared_ptr<RankConnection> Begin() {
    const auto [dials, answers] = Connect();
    EXPECT_TRUE(a_.link.Attach(dials, 0, 0, true, Clock::System().Now()));
    EXPECT_TRUE(b_.link.Attach(answers, 0, 0, true, Clock::System().Now()));
    a_.Start(dials);
    b_.Start(answers);
    return dials;
  }
  // Handles what has come, some of it or all.
  void Poll(uint64_t handlers) {
    io_.restart();
    while (handlers-- > 0 && io_.poll_one() > 0) {
    }
  }
  void PollUntil(const std::function<bool()>& done) {
    const TimePoint until = Clock::System().Now() + std::chrono::seconds(20);
    while (!done() && Clock::System().Now() < until) Poll(100);
  }
  // As a rank that dials and one that answers do it (NetFabric::GoOn), each step when its message may have
  // come.
  void GoOn(Random& random, bool abandoned) {
    const auto [dials, answers] = Connect();
    const uint64_t hello_taken = a_.link.taken();
    Chat(random);
    ASSERT_TRUE(b_.link.Acknowledge(hello_taken));
    const uint64_t answer_taken = b_.link.taken();
    const uint64_t answer_next = b_.link.acknowledged();
    ASSERT_TRUE(b_.link.Attach(answers, b_.link.taken(), hello_taken, /*sure=*/false, Clock::System().Now()));
    b_.Start(answers);
    Chat(random);
    if (abandoned) return;  // the end of `dials` closes it
    ASSERT_TRUE(a_.link.Attach(dials, answer_next, answer_taken, /*sure=*/true, Clock::System().Now()));
    a_.Start(dials);
  }
  void Chat(Random& random) {
    for (uint64_t i = random.Below(20); i > 0; --i) {
      (random.Below(2) == 0 ? a_ : b_).Say();
      if (random.Below(3) == 0) Poll(random.Below(6));
    }
  }

  boost::asio::io_context io_;
  Side a_;
  Side b_;
};

TEST_F(RankLinkTest, EveryMessageOnceAndInOrder) {
  Random random(17);
  Begin();
  for (int i = 0; i < 600; ++i) {
    Chat(random);
    GoOn(random, /*abandoned=*/random.Below(3) == 0);
    if (HasFatalFailure()) return;
  }
  GoOn(random, false);
  PollUntil([&] { return a_.heard == b_.said && b_.heard == a_.said; });
  EXPECT_EQ(a_.heard, b_.said);
  EXPECT_EQ(b_.heard, a_.said);
  EXPECT_GT(a_.said, 5000U);
  EXPECT_FALSE(a_.over || b_.over);
}

TEST_F(RankLinkTest, EndsWithThePeerAndNotWithAWay) {
  std::shared_ptr<RankConnection> dials;  // no structured binding: lambdas cannot name those
  std::shared_ptr<RankConnection> answers;
  std::tie(dials, answers) = Connect();
  const TimePoint begun = Clock::System().Now();
  ASSERT_TRUE(a_.link.Attach(dials, 0, 0, true, begun));
  a_.Start(dials);
  EXPECT_FALSE(a_.link.Quiet(begun + std::chrono::milliseconds(400), std::chrono::milliseconds(500)));
  EXPECT_TRUE(a_.link.Quiet(begun + std::chrono::milliseconds(600), std::chrono::milliseconds(500)));
  dials->Close("this side gives the way up");
  PollUntil([&] { return !a_.link.Uses(dials.get()); });
  EXPECT_FALSE(a_.link.over());
  EXPECT_TRUE(a_.link.Quiet(begun, std::chrono::milliseconds(500))) << "there is no way";
  a_.Say();

  std::tie(dials, answers) = Connect();
  ASSERT_TRUE(a_.link.Attach(dials, 0, 0, /*sure=*/false, Clock::System().Now()));
  a_.Start(dials);
  answers.reset();
  PollUntil([&] { return !a_.link.Uses(dials.get()); });
  EXPECT_FALSE(a_.link.over()) << "nobody has used that connection";

  std::tie(dials, answers) = Connect();
  ASSERT_TRUE(a_.link.Attach(dials, 0, 0, /*sure=*/true, Clock::System().Now()));
  a_.Start(dials);
  EXPECT_FALSE(a_.link.Attach(dials, 1, 0, true, Clock::System().Now()))
      << "it would begin behind what has come";
  EXPECT_FALSE(a_.link.Acknowledge(2)) << "more than was said";
  answers.reset();
  PollUntil([&] { return a_.over; });
  EXPECT_TRUE(a_.over && a_.link.over()) << a_.link.why();
}

// Much more than a socket takes at once, when a link goes on.
TEST_F(RankLinkTest, GoesOnWithALot) {
  group::GroupMessage message;
  message.mutable_grant()->set_held(std::string(400'000, 'x'));
  for (int i = 0; i < 30; ++i) a_.link.Send(message);
  const auto [dials, answers] = Connect();
  uint64_t come = 0;
  answers->Start(
      [&](const group::GroupMessage& got) { come += got.grant().held().size() == 400'000 ? 1 : 1000; },
      [](const std::string&, bool) {});
  ASSERT_TRUE(a_.link.Attach(dials, 0, 0, true, Clock::System().Now()));
  a_.Start(dials);
  a_.link.Send(message);
  PollUntil([&] { return come >= 31; });
  EXPECT_EQ(come, 31U);
  EXPECT_FALSE(a_.over);
}

// An answer to an attempt that was given up must not end the connection that the other side uses.
TEST_F(RankLinkTest, AnAttemptThatWasGivenUpHarmsNobody) {
  const std::shared_ptr<RankConnection> first = Begin();
  for (int i = 0; i < 3; ++i) {
    auto [given_up, late] = Connect();
    given_up.reset();
    ASSERT_TRUE(
        b_.link.Attach(late, b_.link.taken(), a_.link.taken(), /*sure=*/false, Clock::System().Now()));
    b_.Start(late);
    for (int n = 0; n < 50; ++n) Poll(10);
  }
  EXPECT_TRUE(a_.link.Uses(first.get())) << "it is still open";
  EXPECT_FALSE(a_.over || b_.over);
  EXPECT_TRUE(b_.link.IsNewAttempt(4));
  EXPECT_FALSE(b_.link.IsNewAttempt(4));
  EXPECT_FALSE(b_.link.IsNewAttempt(3));
}

TEST_F(RankLinkTest, KeepsOnlySoMuch) {
  group::GroupMessage message;
  message.mutable_grant()->set_held(std::string(500'000, 'x'));
  for (int i = 0; i < 30; ++i) a_.link.Send(message);
  EXPECT_FALSE(a_.link.over());
  for (int i = 0; i < 10; ++i) a_.link.Send(message);
  EXPECT_TRUE(a_.link.over()) << "nobody acknowledges";
}

}  // namespace
}  // namespace millrace::server
