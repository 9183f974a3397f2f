// What a peer that was connected to may answer: to a path with a write, a read and a probe under way, on
// either of its connections.
#include <arpa/inet.h>
#include <sys/socket.h>

#include "base/file.h"
#include "base/log.h"
#include "frames.h"
#include "transfer/tcp/tcp_path.h"

using namespace millrace;
using namespace millrace::transfer;

namespace {

constexpr uint64_t kOwnEpoch = 5, kPeerEpoch = 6;

struct Owner : PathOwner {
  void OnConnected(Path* path) override {
    connected = true;
    Slice write;
    write.id = 1;
    write.local = memory;
    path->Send(write);
    Slice read = write;
    read.id = 2;
    read.operation = Operation::kRead;
    read.express = true;
    read.local = std::span(memory).first(100);
    path->Send(read);
    path->Probe(3);
  }
  void OnBroken(Path* path, const Status&) override {
    broken = true;
    path->Disconnect();
  }
  void OnSliceDone(Path*, uint64_t slice, SliceOutcome) override {
    if (slice > 2 || ++ended[slice] > 1) abort();
  }
  void OnProbeDone(Path*, uint64_t) override {}
  void OnRefused(const Status&) override {}

  std::vector<std::byte> memory = std::vector<std::byte>(300);
  int ended[3] = {};
  bool connected = false;
  bool broken = false;
};

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* bytes, size_t size) {
  static const bool quiet = ConfigureLog({.level = "off", .format = "text"}).ok();
  (void)quiet;
  FuzzedDataProvider data(bytes, size);
  auto loop = *EventLoop::Create();
  const Options options;
  RailEnvironment environment;
  environment.loop = loop.get();
  environment.clock = &Clock::System();
  environment.options = &options;
  environment.epoch = kOwnEpoch;
  environment.on_control = [](ControlChannel* channel, const std::string& kind, const std::string& body) {
    channel->SendMessage(kind, body);
  };

  HostPort bound;
  const UniqueFd listener = *ListenTcp({"127.0.0.1", 0}, &bound);
  Owner owner;
  TcpPath::Target target;
  target.remotes = {bound};
  target.expected_epoch = kPeerEpoch;
  target.traits.kind = "tcp";
  TcpPath path(&environment, target);
  path.Attach(&owner);
  path.Connect();
  auto one = AcceptTcp(listener.get()), other = AcceptTcp(listener.get());
  if (!one.ok() || !other.ok()) return 0;  // not there yet: try another input
  const int speaker = data.ConsumeBool() ? one->get() : other->get();
  const auto say = [](int fd, const std::string& text) {
    (void)!send(fd, text.data(), text.size(), MSG_NOSIGNAL);
  };
  const bool polite = data.ConsumeIntegralInRange(0, 9) != 0;
  for (const int fd : {one->get(), other->get()}) {
    if (polite || fd != speaker) say(fd, HelloOf(kPeerEpoch, kOwnEpoch, v1::Hello::DATA));
  }
  bool spoken = false;
  const TimePoint until = Clock::System().Now() + std::chrono::seconds(2);
  loop->Run([&] {
    char buffer[65536];
    for (const int fd : {one->get(), other->get()}) {
      while (recv(fd, buffer, sizeof(buffer), MSG_DONTWAIT) > 0) {
      }
    }
    if (!spoken && (owner.connected || !polite)) {
      spoken = true;
      say(speaker, polite ? FramesOf(data) : data.ConsumeRemainingBytesAsString());
      shutdown(speaker, SHUT_WR);
    }
    if (owner.broken) loop->Stop();
    const TimePoint now = Clock::System().Now();
    if (now > until) abort();  // a path that does not notice that its peer has gone
    return now + std::chrono::milliseconds(1);
  });
  return 0;
}
