// Peers that misbehave: they stall inside a slice, send wrong checksums or garbage, or come as somebody else.
// A raw client speaks the wire format by hand.
#include <arpa/inet.h>
#include <sys/socket.h>

#include <cstring>

#include "base/digest.h"
#include "base/file.h"
#include "base/net.h"
#include "harness.h"
#include "proto/transfer.pb.h"
#include "transfer/wire.h"

namespace millrace::transfer {
namespace {

class RawClient {
 public:
  explicit RawClient(const std::string& descriptor) {
    v1::PeerDescriptor peer;
    EXPECT_TRUE(peer.ParseFromString(descriptor));
    epoch_ = peer.epoch();
    const HostPort rail = *ParseHostPort(peer.rails(0).address());
    fd_ = UniqueFd(socket(AF_INET, SOCK_STREAM, 0));
    sockaddr_in address{};
    address.sin_family = AF_INET;
    address.sin_port = htons(rail.port);
    inet_pton(AF_INET, rail.host.c_str(), &address.sin_addr);
    EXPECT_EQ(connect(fd_.get(), reinterpret_cast<sockaddr*>(&address), sizeof(address)), 0);
    const timeval limit{5, 0};
    setsockopt(fd_.get(), SOL_SOCKET, SO_RCVTIMEO, &limit, sizeof(limit));
  }

  // Says Hello as `own_epoch`; the other side's refusal, or "".
  std::string Hello(uint64_t own_epoch, uint64_t expected = 0) {
    v1::Hello hello;
    hello.set_protocol_version(kProtocolVersion);
    hello.set_epoch(own_epoch);
    hello.set_expected_epoch(expected == 0 ? epoch_ : expected);
    hello.set_purpose(v1::Hello::DATA);
    Send(WithLength(hello.SerializeAsString()));
    uint32_t size = 0;
    EXPECT_TRUE(Receive(&size, sizeof(size)));
    std::string text(size, '\0');
    EXPECT_TRUE(Receive(text.data(), size));
    EXPECT_TRUE(hello.ParseFromString(text));
    return hello.refusal();
  }

  void Send(const std::string& bytes) {
    EXPECT_EQ(send(fd_.get(), bytes.data(), bytes.size(), MSG_NOSIGNAL), static_cast<ssize_t>(bytes.size()));
  }
  void SendFrame(const Frame& frame) {
    const HeaderBytes header = EncodeFrame(frame);
    Send(std::string(reinterpret_cast<const char*>(header.data()), header.size()));
  }
  bool Receive(void* out, size_t count) {
    return recv(fd_.get(), out, count, MSG_WAITALL) == static_cast<ssize_t>(count);
  }
  StatusOr<Frame> ReceiveFrame() {
    HeaderBytes header;
    if (!Receive(header.data(), header.size())) return Unavailable("closed");
    return DecodeFrame(header);
  }
  bool Closed() {
    char byte = 0;
    return recv(fd_.get(), &byte, 1, 0) <= 0;
  }

 private:
  UniqueFd fd_;
  uint64_t epoch_ = 0;
};

constexpr uint64_t kEpoch = 4711;

class Fence : public testing::Test {
 protected:
  Side receiver_{RailOptions(1), 1 << 20, true, 1};
  TicketId ticket_ = *receiver_.transfer->OpenTicket(kEpoch, {{receiver_.region, 0, 1 << 20}});
  RawClient client_{receiver_.transfer->Descriptor()};

  Frame SliceOf(const std::string& payload, uint64_t offset) {
    Frame frame;
    frame.slice = 1;
    frame.ticket = ticket_;
    frame.region = receiver_.region;
    frame.offset = offset;
    frame.length = static_cast<uint32_t>(payload.size());
    frame.payload_crc = Crc32c(AsBytes(payload));
    return frame;
  }
};

TEST_F(Fence, AStalledSliceIsTornDownBeforeTheTicketDrains) {
  ASSERT_EQ(client_.Hello(kEpoch), "");
  const std::string payload(100'000, 'x');
  client_.SendFrame(SliceOf(payload, 0));
  client_.Send(payload.substr(0, 50'000));
  ASSERT_TRUE(Eventually([&] { return receiver_.transfer->TakeSnapshot().bytes_received >= 50'000; }));
  const Duration took = CloseAndWait(*receiver_.transfer, ticket_);
  EXPECT_GE(took, std::chrono::milliseconds(100)) << "the half-landed slice must be waited for";
  EXPECT_LT(took, std::chrono::seconds(2));
  EXPECT_TRUE(client_.Closed());
  std::fill(receiver_.memory.begin(), receiver_.memory.end(), std::byte{0});
  std::this_thread::sleep_for(std::chrono::milliseconds(50));
  EXPECT_TRUE(std::all_of(receiver_.memory.begin(), receiver_.memory.end(),
                          [](std::byte b) { return b == std::byte{0}; }));
  EXPECT_EQ(receiver_.transfer->TakeSnapshot().open_tickets, 0);
}

TEST_F(Fence, ASliceThatGoesOnIsFinishedBeforeTheTicketDrains) {
  ASSERT_EQ(client_.Hello(kEpoch), "");
  const std::string payload(100'000, 'y');
  client_.SendFrame(SliceOf(payload, 0));
  client_.Send(payload.substr(0, 50'000));
  ASSERT_TRUE(Eventually([&] { return receiver_.transfer->TakeSnapshot().bytes_received >= 50'000; }));
  std::atomic<bool> drained{false};
  receiver_.transfer->CloseTicket(ticket_, [&] { drained = true; });
  std::this_thread::sleep_for(std::chrono::milliseconds(20));
  EXPECT_FALSE(drained);
  client_.Send(payload.substr(50'000));
  ASSERT_TRUE(Eventually([&] { return drained.load(); }));
  EXPECT_EQ(client_.ReceiveFrame()->code, SliceCode::kLanded);
  EXPECT_EQ(receiver_.memory[99'999], static_cast<std::byte>('y'));
}

TEST_F(Fence, AWrongChecksumIsAnsweredAsSuchAndNeverAsDone) {
  ASSERT_EQ(client_.Hello(kEpoch), "");
  Frame frame = SliceOf("payload", 10);
  ++frame.payload_crc;
  client_.SendFrame(frame);
  client_.Send("payload");
  EXPECT_EQ(client_.ReceiveFrame()->code, SliceCode::kBadChecksum);
  client_.SendFrame(SliceOf("payload", 10));
  client_.Send("payload");
  EXPECT_EQ(client_.ReceiveFrame()->code, SliceCode::kLanded);
  EXPECT_EQ(receiver_.transfer->TakeSnapshot().slices_refused, 1U);
}

TEST_F(Fence, AnotherEpochsTicketIsRefusedAndTheConnectionLivesOn) {
  ASSERT_EQ(client_.Hello(kEpoch + 1), "");
  const auto before = receiver_.memory;
  for (int i = 0; i < 3; ++i) {
    client_.SendFrame(SliceOf("payload", 10));
    client_.Send("payload");
    EXPECT_EQ(client_.ReceiveFrame()->code, SliceCode::kRefused);
  }
  EXPECT_EQ(receiver_.memory, before);
}

TEST_F(Fence, ARestartedProcessIsToldApart) {
  EXPECT_NE(client_.Hello(kEpoch, 12345), "");
  EXPECT_TRUE(client_.Closed());
}

TEST_F(Fence, GarbageClosesTheConnectionAndNothingElse) {
  for (uint64_t seed = 0; seed < 200; ++seed) {
    RawClient stranger(receiver_.transfer->Descriptor());
    const auto bytes = RandomBytes(1 + seed * 7 % 500, seed);
    if (seed % 2 == 0) {
      ASSERT_EQ(stranger.Hello(kEpoch), "");
    }
    stranger.Send(std::string(reinterpret_cast<const char*>(bytes.data()), bytes.size()));
  }
  ASSERT_EQ(client_.Hello(kEpoch), "");
  client_.SendFrame(SliceOf("still here", 0));
  client_.Send("still here");
  EXPECT_EQ(client_.ReceiveFrame()->code, SliceCode::kLanded);
}

TEST(Wire, EveryFlippedBitOfAHeaderIsNoticed) {
  Frame frame;
  frame.slice = 7;
  frame.ticket = 8;
  frame.region = 9;
  frame.offset = 1ULL << 40;
  frame.length = 4096;
  const HeaderBytes good = EncodeFrame(frame);
  EXPECT_EQ(DecodeFrame(good)->offset, frame.offset);
  for (size_t bit = 0; bit < kHeaderBytes * 8; ++bit) {
    HeaderBytes bad = good;
    bad[bit / 8] ^= static_cast<std::byte>(1U << (bit % 8));
    EXPECT_FALSE(DecodeFrame(bad).ok()) << bit;
  }
}

}  // namespace
}  // namespace millrace::transfer
