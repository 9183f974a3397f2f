// What the other end of an RDMA link may say, in either role: messages over the control session and over the
// queue pairs of a link, on the fake fabric. A hostile initiator meets a target with an open ticket for
// writes and one for reads; a hostile target a path with a write, a read and a probe under way. The stranger
// has no keys but those that it was lent: what it does with a key of a whole region only the adapter could
// stop (transfer/rdma/README.md).
#include <fuzzer/FuzzedDataProvider.h>

#include <cstring>

#include "base/log.h"
#include "tests/fuzz/path_owner.h"
#include "tests/transfer/rdma/fake_verbs.h"
#include "transfer/rdma/rdma_rails.h"

using namespace millrace;
using namespace millrace::transfer;
using namespace millrace::transfer::rdma;

namespace {

constexpr uint64_t kOwnEpoch = 5, kPeerEpoch = 6;
constexpr size_t kMemory = 4096;

struct Channel : ControlChannel {
  bool SendMessage(const std::string&, const std::string& body) override {
    rdma::v1::Message message;
    if (!message.ParseFromString(body)) abort();
    if (message.has_connect()) connect = message.connect();
    if (message.has_accept()) accept = message.accept();
    return true;
  }
  uint64_t peer_epoch() const override { return kPeerEpoch; }
  rdma::v1::Connect connect;
  rdma::v1::Accept accept;
};

// The stranger: a device and an end of its own.
class Stranger {
 public:
  Stranger(const FakeFabric& fabric, EventLoop* loop) {
    device_ = std::move(OpenDevices(fabric.verbs(), std::vector<std::string>{"a"}, {}).at(0));
    own_ = *device_->RegisterMemory(memory_, true);
    EndpointEvents events;
    events.frame = [this](uint32_t, const Frame& frame) {
      if (frame.kind == FrameKind::kAnswer && frame.verdict == Verdict::kGranted) lent_.push_back(frame);
    };
    events.immediate = [](uint32_t, uint32_t) {};
    events.data_done = [](uint32_t, uint32_t) {};
    events.failed = [](const Status&) {};
    end_ = *Endpoint::Create(device_.get(), loop, kQueuePairs, std::move(events));
  }
  ~Stranger() {
    end_.reset();
    device_->DeregisterMemory(own_);
  }
  rdma::v1::End Prepare() {
    rdma::v1::End message;
    (void)end_->Stop();
    lent_.clear();
    if (const auto end = end_->Prepare(); end.ok()) FillEnd(*end, &message);
    return message;
  }
  void Connect(const rdma::v1::End& remote) {
    const auto end = ParseEnd(remote);
    if (end.ok() && !end_->connected()) (void)end_->Connect(*end);
  }
  bool connected() const { return end_->connected(); }
  void SendFrame(FuzzedDataProvider& data) {
    const auto number = [&]() -> uint64_t {
      return data.ConsumeBool() ? data.ConsumeIntegralInRange<uint64_t>(0, 5)
                                : data.ConsumeIntegral<uint64_t>();
    };
    Frame frame;
    frame.kind = static_cast<FrameKind>(data.ConsumeIntegralInRange<int>(0, 6));
    frame.slot = static_cast<uint32_t>(data.ConsumeIntegralInRange<uint64_t>(0, kSlots));
    frame.read = data.ConsumeBool();
    frame.ticket = number();
    frame.region = static_cast<uint32_t>(number());
    frame.offset = number();
    frame.length = static_cast<uint32_t>(number());
    frame.slice = number();
    frame.attempt = static_cast<uint32_t>(number());
    frame.retired_below = number();
    frame.verdict = static_cast<Verdict>(data.ConsumeIntegralInRange<int>(0, 3));
    // To a path: its answers name the stranger's memory, or any.
    const bool own = data.ConsumeBool();
    if (frame.kind == FrameKind::kAnswer) {
      frame.address = own ? reinterpret_cast<uint64_t>(own_->addr) : number();
      frame.key = own ? own_->rkey : static_cast<uint32_t>(number());
    }
    if (frame.kind == FrameKind::kProbe || frame.kind == FrameKind::kProbeAnswer) frame.number = number();
    (void)end_->SendFrame(data.ConsumeIntegralInRange<uint32_t>(0, kQueuePairs - 1), frame);
  }
  // With what it was lent, if anything, under any slot.
  void Move(FuzzedDataProvider& data) {
    if (lent_.empty()) return;
    const Frame& lent = lent_[data.ConsumeIntegralInRange<size_t>(0, lent_.size() - 1)];
    Endpoint::Data move;
    move.read = data.ConsumeBool();
    move.local = memory_.data();
    move.local_key = own_->lkey;
    move.length = data.ConsumeIntegralInRange<uint32_t>(1, kMemory);
    move.remote = lent.address;
    move.remote_key = lent.key;
    move.slot = data.ConsumeBool() ? lent.slot : data.ConsumeIntegral<uint32_t>();
    (void)end_->SendData(data.ConsumeIntegralInRange<uint32_t>(0, kQueuePairs - 1), move);
  }

 private:
  std::vector<std::byte> memory_ = std::vector<std::byte>(kMemory);
  std::unique_ptr<Device> device_;
  ibv_mr* own_ = nullptr;
  std::unique_ptr<Endpoint> end_;
  std::vector<Frame> lent_;
};

rdma::v1::End EndOf(FuzzedDataProvider& data) {
  rdma::v1::End end;
  end.set_gid(data.ConsumeBool() ? std::string(16, '\1') : data.ConsumeRandomLengthString(20));
  end.set_lid(data.ConsumeBool() ? 0 : data.ConsumeIntegral<uint32_t>());
  end.set_mtu(data.ConsumeIntegralInRange<uint32_t>(0, 7));
  const int pairs = data.ConsumeIntegralInRange(0, 20);
  for (int i = 0; i < pairs; ++i) {
    rdma::v1::QueuePair& pair = *end.add_queue_pairs();
    pair.set_number(data.ConsumeIntegral<uint32_t>());
    pair.set_first_psn(data.ConsumeIntegral<uint32_t>());
  }
  return end;
}

// A message over the control session; `end`: the stranger's own, so that a link is made.
std::string MessageOf(FuzzedDataProvider& data, Stranger& stranger) {
  rdma::v1::Message message;
  const uint64_t link = data.ConsumeIntegralInRange<uint64_t>(0, 3);
  const auto generation = data.ConsumeIntegralInRange<uint32_t>(0, 6);
  const auto end = [&] { return data.ConsumeBool() ? stranger.Prepare() : EndOf(data); };
  switch (data.ConsumeIntegralInRange(0, 3)) {
    case 0:
      message.mutable_connect()->set_link(link);
      message.mutable_connect()->set_generation(generation);
      message.mutable_connect()->set_rail(data.ConsumeBool() ? "b" : data.ConsumeRandomLengthString(8));
      *message.mutable_connect()->mutable_end() = end();
      break;
    case 1:
      message.mutable_accept()->set_link(link);
      message.mutable_accept()->set_generation(generation);
      *message.mutable_accept()->mutable_end() = end();
      if (data.ConsumeBool()) message.mutable_accept()->set_refusal(data.ConsumeRandomLengthString(8));
      break;
    case 2:
      message.mutable_broken()->set_link(link);
      message.mutable_broken()->set_generation(generation);
      message.mutable_broken()->set_from_initiator(data.ConsumeBool());
      message.mutable_broken()->set_reason(data.ConsumeRandomLengthString(8));
      break;
    default:
      return data.ConsumeRandomLengthString(100);
  }
  return message.SerializeAsString();
}

std::string AddressOf(const FakeFabric& fabric) {
  const auto devices = OpenDevices(fabric.verbs(), std::vector<std::string>{"a"}, {});
  std::string text;
  for (const uint8_t byte : devices.at(0)->address().gid) text += fmt::format("{:02x}", byte);
  return text + " a";
}

void Converse(FuzzedDataProvider& data, const FakeFabric& fabric, RdmaRails& rails, EventLoop* loop,
              bool initiator, FuzzPathOwner* owner) {
  Channel channel;
  Stranger stranger(fabric, loop);
  std::vector<std::unique_ptr<Path>> paths;
  if (initiator) {  // the stranger's link is made as it ought to be
    rdma::v1::Message message;
    message.mutable_connect()->set_link(1);
    message.mutable_connect()->set_generation(1);
    message.mutable_connect()->set_rail("b");
    *message.mutable_connect()->mutable_end() = stranger.Prepare();
    rails.OnControl(&channel, message.SerializeAsString());
  } else {
    paths = *rails.MakePaths({kPeerEpoch, "stranger", {{"rdma", AddressOf(fabric)}}}, &channel);
    if (paths.size() != 1) abort();
    paths[0]->Attach(owner);
    paths[0]->Connect();
    rdma::v1::Message message;
    message.mutable_accept()->set_link(channel.connect.link());
    message.mutable_accept()->set_generation(channel.connect.generation());
    *message.mutable_accept()->mutable_end() = stranger.Prepare();
    stranger.Connect(channel.connect.end());
    rails.OnControl(&channel, message.SerializeAsString());
    if (owner->connected != 1) abort();
  }
  if (initiator && !channel.accept.refusal().empty()) abort();
  int quiet_rounds = 0;
  loop->Run([&] {
    stranger.Connect(initiator ? channel.accept.end() : channel.connect.end());
    for (int i = 0; i < 4 && data.remaining_bytes() > 0; ++i) {
      switch (data.ConsumeIntegralInRange(0, 7)) {
        case 0:
          rails.OnControl(&channel, MessageOf(data, stranger));
          break;
        case 1:
        case 2:
          if (stranger.connected()) stranger.Move(data);
          break;
        case 3:
          if (!paths.empty() && owner->broken && data.ConsumeBool()) {
            owner->broken = false;
            paths[0]->Connect();
          }
          break;
        default:
          if (stranger.connected()) stranger.SendFrame(data);
      }
    }
    if (data.remaining_bytes() == 0 && ++quiet_rounds == 3) loop->Stop();
    const TimePoint now = Clock::System().Now();
    rails.Tick(now);
    return now;
  });
  owner->broken = true;
  for (const auto& path : paths) path->Disconnect();
  if (!owner->under_way.empty()) abort();  // a slice that was never reported
  rails.OnControlClosed(&channel);
  paths.clear();
  rails.CloseAll();
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* bytes, size_t size) {
  static const bool quiet = ConfigureLog({.level = "off", .format = "text"}).ok();
  (void)quiet;
  if (size >= kFrameBytes) {
    const auto frame = Decode(std::as_bytes(std::span(bytes, kFrameBytes)));
    // What is accepted reads back the same.
    if (frame.ok() && (!Decode(Encode(*frame)).ok() || Encode(*Decode(Encode(*frame))) != Encode(*frame)))
      abort();
  }
  FuzzedDataProvider data(bytes, size);
  FakeFabric fabric({"a", "b"});
  auto loop = *EventLoop::Create();
  MemoryTable memory;
  LandingTable landing;
  Options options;
  options.kinds = {"rdma"};
  options.include = {"b"};
  std::vector<std::byte> writable(kMemory), guarded(kMemory, std::byte{7}), local(kMemory);
  RailEnvironment environment;
  environment.loop = loop.get();
  environment.clock = &Clock::System();
  environment.memory = &memory;
  environment.landing = &landing;
  environment.options = &options;
  environment.epoch = kOwnEpoch;
  {
    RdmaRails rails(environment, fabric.verbs());
    if (!rails.Start().ok()) abort();
    FuzzPathOwner owner;
    RegionId region = 0;
    for (auto* const block : {&writable, &guarded, &local}) {
      const RegionId id = memory.Register(*block, true);
      if (!rails.RegisterRegion(id, *block, true).ok()) abort();
      if (block == &writable) region = id;
      owner.region = id;  // the last
    }
    owner.memory = local;
    if (!memory.Open(kPeerEpoch, {{region, 0, kMemory}}).ok()) abort();
    if (!memory.Open(kPeerEpoch, {{region, 0, kMemory}}, Operation::kRead).ok()) abort();
    Converse(data, fabric, rails, loop.get(), data.ConsumeBool(), &owner);
    loop->RunRemaining();
  }
  if (fabric.live() != 0) abort();  // an object of the device was left behind
  for (const std::byte b : guarded) {
    if (b != std::byte{7}) abort();  // no ticket names this region
  }
  memory.CloseAll();
  if (memory.num_open() != 0) abort();  // a pin was left behind
  if (landing.num_entries() != 0) abort();
  return 0;
}
