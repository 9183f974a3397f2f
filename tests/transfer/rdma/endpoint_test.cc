// Devices and the two ends of a link on the fake fabric: life cycle, what goes wrong, and that nothing is
// left behind.
#include "transfer/rdma/endpoint.h"

#include <gtest/gtest.h>

#include <cstring>

#include "base/random.h"
#include "fake_verbs.h"
#include "transfer/rdma/regions.h"

namespace millrace::transfer::rdma {
namespace {

ibv_gid_entry Gid(ibv_gid_type type, std::array<uint8_t, 16> gid, uint32_t index) {
  ibv_gid_entry entry{};
  entry.gid_type = static_cast<uint32_t>(type);
  std::copy(gid.begin(), gid.end(), entry.gid.raw);
  entry.gid_index = index;
  entry.port_num = 1;
  return entry;
}
constexpr std::array<uint8_t, 16> kLinkLocal = {0xfe, 0x80, 0, 0, 0, 0, 0, 0, 1};
constexpr std::array<uint8_t, 16> kGlobal = {0x20, 0x01, 0, 0, 0, 0, 0, 0, 1};
constexpr std::array<uint8_t, 16> kMapped = {0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, 10, 77, 0, 1};

TEST(ChooseGid, PrefersRoutableRoceV2AndNeverVersion1) {
  const auto index = [](std::vector<ibv_gid_entry> entries) {
    const ibv_gid_entry* const chosen = ChooseGid(entries);
    return chosen == nullptr ? -1 : static_cast<int>(chosen->gid_index);
  };
  const auto v1 = IBV_GID_TYPE_ROCE_V1;
  const auto v2 = IBV_GID_TYPE_ROCE_V2;
  EXPECT_EQ(index({}), -1);
  EXPECT_EQ(index({Gid(v1, kMapped, 0)}), -1);
  EXPECT_EQ(index({Gid(v1, kLinkLocal, 0), Gid(v2, kLinkLocal, 1), Gid(v1, kMapped, 2), Gid(v2, kMapped, 3)}),
            3);
  EXPECT_EQ(index({Gid(v2, kLinkLocal, 0), Gid(v2, kGlobal, 1)}), 1);
  EXPECT_EQ(index({Gid(v2, kMapped, 5), Gid(v2, kMapped, 3)}), 3) << "the lowest of equals";
  EXPECT_EQ(index({Gid(IBV_GID_TYPE_IB, kLinkLocal, 0)}), 0) << "InfiniBand has nothing better";
}

TEST(GidText, NamesIpv4AsSuch) {
  EXPECT_EQ(GidText(kMapped), "10.77.0.1");
  EXPECT_EQ(GidText(kGlobal), "2001::100:0:0:0");
  EXPECT_EQ(CommonPrefixBits(kMapped, kMapped), 128);
  auto other = kMapped;
  other[14] = 1;
  EXPECT_EQ(CommonPrefixBits(kMapped, other), 119);
}

TEST(Frame, ComesBackAsItWas) {
  Frame request;
  request.kind = FrameKind::kRequest;
  request.slot = 31;
  request.read = true;
  request.ticket = 0x1122334455667788;
  request.region = 7;
  request.offset = 1ULL << 40;
  request.length = 4096;
  request.slice = 99;
  request.attempt = 3;
  request.retired_below = 90;
  const auto back = Decode(Encode(request));
  ASSERT_TRUE(back.ok()) << back.status();
  EXPECT_EQ(Encode(*back), Encode(request));
  Frame answer;
  answer.kind = FrameKind::kAnswer;
  answer.verdict = Verdict::kSuperseded;
  answer.address = 0xabcdef;
  answer.key = 12;
  const auto verdict = Decode(Encode(answer));
  ASSERT_TRUE(verdict.ok());
  EXPECT_EQ(verdict->verdict, Verdict::kSuperseded);
  EXPECT_EQ(verdict->address, answer.address);
}

TEST(Frame, RandomBytesAreRefusedOrHarmless) {
  Random random(11);
  int accepted = 0;
  for (int i = 0; i < 200'000; ++i) {
    FrameBytes bytes;
    for (std::byte& byte : bytes) byte = static_cast<std::byte>(random.Next());
    if (i % 2 == 0) {  // near misses
      Frame frame;
      frame.kind = static_cast<FrameKind>(1 + random.Below(5));
      frame.length = 1;
      frame.attempt = 1;
      bytes = Encode(frame);
      bytes[random.Below(kFrameBytes)] ^= static_cast<std::byte>(1U << random.Below(8));
    }
    const auto frame = Decode(bytes);
    if (!frame.ok()) continue;
    ++accepted;
    EXPECT_LT(frame->slot, kSlots);
    if (frame->kind == FrameKind::kRequest) {
      EXPECT_TRUE(frame->length > 0 && frame->length <= kSliceBytesMax);
    }
  }
  EXPECT_GT(accepted, 1000) << "the near misses include harmless ones";
}

// Two devices, an end on each, one loop that the test turns by hand.
class LinkTest : public testing::Test {
 protected:
  struct Side {
    std::unique_ptr<Device> device;
    std::unique_ptr<Endpoint> endpoint;
    std::vector<Frame> frames;
    std::vector<uint32_t> immediates;
    std::vector<uint32_t> done;
    std::vector<Status> failures;
  };
  void SetUp() override {
    for (size_t i = 0; i < 2; ++i) {
      auto devices = OpenDevices(fabric_.verbs(), std::vector<std::string>{i == 0 ? "a" : "b"}, {});
      ASSERT_EQ(devices.size(), 1U);
      sides_[i].device = std::move(devices[0]);
      ASSERT_TRUE(Make(i).ok());
    }
  }
  void TearDown() override {
    for (Side& side : sides_) {
      side.endpoint.reset();
      side.device.reset();
    }
    loop_->RunRemaining();
    if (!keeps_) {
      EXPECT_EQ(fabric_.live(), 0) << fabric_.live_text();
    }
  }
  Status Make(size_t i) {
    Side& side = sides_[i];
    EndpointEvents events;
    events.frame = [&side](uint32_t, const Frame& frame) { side.frames.push_back(frame); };
    events.immediate = [&side](uint32_t, uint32_t immediate) { side.immediates.push_back(immediate); };
    events.data_done = [&side](uint32_t, uint32_t slot) { side.done.push_back(slot); };
    events.failed = [&side](const Status& why) { side.failures.push_back(why); };
    MR_ASSIGN_OR_RETURN(side.endpoint,
                        Endpoint::Create(side.device.get(), loop_.get(), 2, std::move(events)));
    return OkStatus();
  }
  void Join() {
    const auto a = sides_[0].endpoint->Prepare();
    const auto b = sides_[1].endpoint->Prepare();
    ASSERT_TRUE(a.ok()) << a.status();
    ASSERT_TRUE(b.ok()) << b.status();
    ASSERT_TRUE(sides_[1].endpoint->Connect(*a).ok());
    ASSERT_TRUE(sides_[0].endpoint->Connect(*b).ok());
  }
  void Turn() {
    for (int round = 0; round < 3; ++round) {
      for (Side& side : sides_) {
        if (side.endpoint != nullptr) side.endpoint->Poll();
      }
      loop_->RunRemaining();
    }
  }
  Endpoint::Data Move(bool read, ibv_mr* local, ibv_mr* remote, uint32_t slot) {
    Endpoint::Data data;
    data.read = read;
    data.local = static_cast<std::byte*>(local->addr);
    data.local_key = local->lkey;
    data.length = static_cast<uint32_t>(local->length);
    data.remote = reinterpret_cast<uint64_t>(remote->addr);
    data.remote_key = remote->rkey;
    data.slot = slot;
    return data;
  }

  FakeFabric fabric_{{"a", "b"}};
  std::unique_ptr<EventLoop> loop_ = *EventLoop::Create();
  Side sides_[2];
  bool keeps_ = false;  // a test that makes the fabric keep objects
};

TEST_F(LinkTest, MovesFramesWritesAndReads) {
  Join();
  std::vector<std::byte> from(1000, std::byte{7});
  std::vector<std::byte> to(1000);
  ibv_mr* const source = *sides_[0].device->RegisterMemory(from, true);
  ibv_mr* const target = *sides_[1].device->RegisterMemory(to, true);
  Frame frame;
  frame.kind = FrameKind::kProbe;
  frame.number = 5;
  ASSERT_TRUE(sides_[0].endpoint->SendFrame(1, frame).ok());
  ASSERT_TRUE(sides_[0].endpoint->SendData(1, Move(false, source, target, 9)).ok());
  Turn();
  ASSERT_EQ(sides_[1].frames.size(), 1U);
  EXPECT_EQ(sides_[1].frames[0].number, 5U);
  EXPECT_EQ(sides_[1].immediates, std::vector<uint32_t>{9});
  EXPECT_EQ(sides_[0].done, std::vector<uint32_t>{9});
  EXPECT_EQ(from, to);
  std::fill(to.begin(), to.end(), std::byte{8});
  ASSERT_TRUE(sides_[0].endpoint->SendData(0, Move(true, source, target, 3)).ok());
  Turn();
  EXPECT_EQ(from, to);
  EXPECT_EQ(sides_[0].done.back(), 3U);
  sides_[0].device->DeregisterMemory(source);
  sides_[1].device->DeregisterMemory(target);
}

TEST_F(LinkTest, AResetReceiverLetsNothingLateLand) {
  std::vector<std::byte> from(64, std::byte{7});
  std::vector<std::byte> to(64);
  ibv_mr* const source = *sides_[0].device->RegisterMemory(from, true);
  ibv_mr* const target = *sides_[1].device->RegisterMemory(to, true);
  for (const bool reset : {false, true}) {
    Join();
    fabric_.SetWire("a", FakeFabric::Wire::kHold);
    ASSERT_TRUE(sides_[0].endpoint->SendData(0, Move(false, source, target, 1)).ok());
    EXPECT_TRUE(sides_[0].endpoint->Stop()) << "the sender has given it up, yet it is in the network";
    if (reset) {
      EXPECT_TRUE(sides_[1].endpoint->Stop());
    }
    fabric_.SetWire("a", FakeFabric::Wire::kGood);
    EXPECT_EQ(to == from, !reset)
        << "without the receiver's reset the fabric must let it land, or this tests nothing";
    std::fill(to.begin(), to.end(), std::byte{0});
    sides_[1].endpoint->Stop();
  }
  sides_[0].device->DeregisterMemory(source);
  sides_[1].device->DeregisterMemory(target);
}

TEST_F(LinkTest, TheSameQueuePairsCarryAgainAfterAnOutage) {
  std::vector<std::byte> memory(64, std::byte{1});
  ibv_mr* const source = *sides_[0].device->RegisterMemory(memory, true);
  ibv_mr* const target = *sides_[1].device->RegisterMemory(memory, true);
  for (int outage = 0; outage < 5; ++outage) {
    Join();
    ASSERT_TRUE(sides_[0].endpoint->SendData(0, Move(false, source, target, 1)).ok());
    Turn();
    ASSERT_EQ(sides_[0].done.size(), static_cast<size_t>(outage + 1));
    fabric_.SetPort("a", false);
    ASSERT_TRUE(sides_[0].endpoint->SendData(0, Move(false, source, target, 2)).ok());
    Turn();
    EXPECT_EQ(sides_[0].failures.size(), static_cast<size_t>(outage + 1)) << "one outage is told once";
    EXPECT_TRUE(sides_[0].endpoint->Stop());
    EXPECT_TRUE(sides_[1].endpoint->Stop());
    EXPECT_FALSE(sides_[0].endpoint->Prepare().ok()) << "the port is down";
    fabric_.SetPort("a", true);
  }
  EXPECT_EQ(fabric_.queue_pairs("a"), 2);
  sides_[0].device->DeregisterMemory(source);
  sides_[1].device->DeregisterMemory(target);
}

TEST_F(LinkTest, FullQueuesAndFailingPostsAreToldApart) {
  Join();
  Frame frame;
  fabric_.FailCall("post_send", 1, ENOMEM);
  EXPECT_EQ(sides_[0].endpoint->SendFrame(0, frame).code(), absl::StatusCode::kResourceExhausted);
  Turn();
  EXPECT_TRUE(sides_[0].failures.empty()) << "no room is no failure";
  fabric_.FailCall("post_send", 1, EINVAL);
  EXPECT_EQ(sides_[0].endpoint->SendFrame(0, frame).code(), absl::StatusCode::kUnavailable);
  EXPECT_TRUE(sides_[0].failures.empty()) << "told on a stack of its own";
  Turn();
  EXPECT_EQ(sides_[0].failures.size(), 1U);
}

TEST_F(LinkTest, RefusesWhatAPeerCannotMean) {
  const End mine = *sides_[0].endpoint->Prepare();
  End end = mine;
  end.queue_pairs.pop_back();
  EXPECT_EQ(sides_[0].endpoint->Connect(end).code(), absl::StatusCode::kInvalidArgument);
  end = mine;
  end.queue_pairs[0].number = 1 << 24;
  EXPECT_EQ(sides_[0].endpoint->Connect(end).code(), absl::StatusCode::kInvalidArgument);
}

TEST_F(LinkTest, EveryStepOfMakingAnEndMayFailAndLeavesNothing) {
  for (Side& side : sides_) side.endpoint.reset();
  const int before = fabric_.live();
  for (const char* const call : {"create_comp_channel", "reg_mr", "create_cq", "create_qp"}) {
    for (const int nth : {1, 2}) {
      fabric_.FailCall(call, nth, ENOMEM);
      const Status status = Make(0);
      const bool happens_twice = std::string(call) == "create_cq" || std::string(call) == "create_qp";
      EXPECT_EQ(status.ok(), nth == 2 && !happens_twice) << call << " " << status;
      if (!status.ok()) {
        EXPECT_NE(Message(status).find("device a"), std::string_view::npos) << status;
      }
      fabric_.Heal();
      sides_[0].endpoint.reset();
      EXPECT_EQ(fabric_.live(), before) << call << ": " << fabric_.live_text();
    }
  }
}

TEST_F(LinkTest, ADeviceThatKeepsAQueuePairIsReported) {
  Join();
  fabric_.FailCall("modify_qp", 1, EIO);
  EXPECT_FALSE(sides_[0].endpoint->Stop());
  fabric_.FailCall("destroy_qp", 1, EIO);
  EXPECT_FALSE(sides_[0].endpoint->Destroy());
  fabric_.Heal();
  EXPECT_FALSE(sides_[0].endpoint->Prepare().ok());
  keeps_ = true;
  EXPECT_NE(fabric_.live_text().find("queue pair"), std::string::npos);
}

TEST(Devices, EveryStepOfOpeningMayFailAndLeavesNothing) {
  FakeFabric fabric({"x", "y"});
  for (const char* const call : {"open_device", "query_device", "alloc_pd"}) {
    for (const int nth : {1, 2}) {
      fabric.FailCall(call, nth, ENOMEM);
      auto devices = OpenDevices(fabric.verbs(), {}, {});
      EXPECT_EQ(devices.size(), static_cast<size_t>(nth - 1)) << call;
      fabric.Heal();
      devices.clear();
      EXPECT_EQ(fabric.live(), 0) << call << ": " << fabric.live_text();
    }
  }
  fabric.FailCall("get_device_list", 1, ENOSYS);
  EXPECT_TRUE(OpenDevices(fabric.verbs(), {}, {}).empty()) << "no kernel support is no device";
}

TEST(Devices, PatternsLetThroughByNameOrAddress) {
  FakeFabric fabric({"mlx5_1", "mlx5_0", "bnxt_0"});
  const auto names = [&](std::vector<std::string> include, std::vector<std::string> exclude) {
    std::string text;
    for (const auto& device : OpenDevices(fabric.verbs(), include, exclude)) text += device->name() + " ";
    return text;
  };
  EXPECT_EQ(names({}, {}), "bnxt_0 mlx5_0 mlx5_1 ");
  EXPECT_EQ(names({"mlx5_*"}, {}), "mlx5_0 mlx5_1 ");
  EXPECT_EQ(names({"mlx5_*"}, {"*_1"}), "mlx5_0 ");
  EXPECT_EQ(names({"10.0.1.*"}, {}), "mlx5_0 ");
}

TEST(Regions, ADeviceThatCannotRegisterIsOutOfServiceAndSaysWhy) {
  FakeFabric fabric({"x", "y"});
  auto devices = OpenDevices(fabric.verbs(), {}, {});
  {
    Regions regions({devices[0].get(), devices[1].get()});
    std::vector<std::byte> memory(1 << 16);
    ASSERT_TRUE(regions.Register(1, memory, true).ok());
    fabric.FailCall("reg_mr", 2, ENOMEM);
    const Status status = regions.Register(2, memory, true);
    fabric.Heal();
    EXPECT_EQ(status.code(), absl::StatusCode::kResourceExhausted);
    EXPECT_NE(Message(status).find("65536 bytes cannot be registered"), std::string_view::npos) << status;
    EXPECT_EQ(regions.Usable(0).ok() ? 1 : 0, regions.Usable(1).ok() ? 0 : 1) << "one of the two failed";
    EXPECT_TRUE(regions.Find(0, 1).ok() && regions.Find(1, 1).ok());
    regions.Deregister(2);
    EXPECT_TRUE(regions.Usable(0).ok() && regions.Usable(1).ok());
  }
  devices.clear();
  EXPECT_EQ(fabric.live(), 0) << fabric.live_text();
}

TEST(Regions, MemoryOfAnotherDeviceGoesThroughDmabufOrSaysThatItCannot) {
  FakeFabric fabric({"x"});
  auto devices = OpenDevices(fabric.verbs(), {}, {});
  std::vector<std::byte> memory(4096);
  const auto iova = reinterpret_cast<uint64_t>(memory.data());
  const auto mr = devices[0]->RegisterDmabuf(3, 0, memory.size(), iova, true);
  ASSERT_TRUE(mr.ok()) << mr.status();
  devices[0]->DeregisterMemory(*mr);
  fabric.FailCall("reg_dmabuf_mr", 1, EOPNOTSUPP);
  EXPECT_EQ(devices[0]->RegisterDmabuf(3, 0, memory.size(), iova, true).status().code(),
            absl::StatusCode::kUnimplemented);
  fabric.Heal();
  fabric.mutable_verbs()->reg_dmabuf_mr = nullptr;
  EXPECT_EQ(devices[0]->RegisterDmabuf(3, 0, memory.size(), iova, true).status().code(),
            absl::StatusCode::kUnimplemented);
}

TEST(SystemVerbs, AreThereOrSayWhyNot) {
  const auto verbs = SystemVerbs();
  if (!verbs.ok()) {
    EXPECT_EQ(verbs.status().code(), absl::StatusCode::kUnavailable);
    GTEST_SKIP() << Message(verbs.status());
  }
  EXPECT_NE((*verbs)->create_qp, nullptr);
}

}  // namespace
}  // namespace millrace::transfer::rdma
