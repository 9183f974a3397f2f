// What a connection that was accepted may send: to the receiver with an open ticket for writes and one for
// reads.
#include <arpa/inet.h>
#include <sys/socket.h>

#include <algorithm>

#include "base/file.h"
#include "base/log.h"
#include "frames.h"
#include "transfer/tcp/tcp_receiver.h"

using namespace millrace;
using namespace millrace::transfer;

namespace {

constexpr uint64_t kOwnEpoch = 5, kPeerEpoch = 6;

UniqueFd ConnectTo(const HostPort& to) {
  UniqueFd fd(socket(AF_INET, SOCK_STREAM, 0));
  sockaddr_in address{};
  address.sin_family = AF_INET;
  address.sin_port = htons(to.port);
  inet_pton(AF_INET, to.host.c_str(), &address.sin_addr);
  if (connect(fd.get(), reinterpret_cast<sockaddr*>(&address), sizeof(address)) != 0) abort();
  return fd;
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* bytes, size_t size) {
  static const bool quiet = ConfigureLog({.level = "off", .format = "text"}).ok();
  (void)quiet;
  FuzzedDataProvider data(bytes, size);
  auto loop = *EventLoop::Create();
  MemoryTable memory;
  LandingTable landing;
  const Options options;
  std::vector<std::byte> writable(4096), guarded(4096, std::byte{7});
  const RegionId region = memory.Register(writable, true);
  memory.Register(guarded, true);
  if (!memory.Open(kPeerEpoch, {{region, 0, 4096}}).ok()) abort();
  if (!memory.Open(kPeerEpoch, {{region, 0, 4096}}, Operation::kRead).ok()) abort();

  RailEnvironment environment;
  environment.loop = loop.get();
  environment.clock = &Clock::System();
  environment.memory = &memory;
  environment.landing = &landing;
  environment.options = &options;
  environment.epoch = kOwnEpoch;
  environment.on_control = [](ControlChannel* channel, const std::string& kind, const std::string& body) {
    channel->SendMessage(kind, body);
  };
  environment.on_control_closed = [](ControlChannel*) {};
  {
    TcpReceiver receiver(&environment);
    HostPort bound;
    if (!receiver.Listen({"127.0.0.1", 0}, &bound).ok()) abort();
    const UniqueFd client = ConnectTo(bound);
    const int start = data.ConsumeIntegralInRange(0, 9);
    std::string text;
    if (start == 0) {
      text = data.ConsumeRemainingBytesAsString();
    } else {
      text =
          HelloOf(kPeerEpoch, start == 1 ? 99 : kOwnEpoch, start < 4 ? v1::Hello::CONTROL : v1::Hello::DATA);
      text += FramesOf(data);
    }
    (void)!send(client.get(), text.data(), text.size(), MSG_NOSIGNAL | MSG_DONTWAIT);
    shutdown(client.get(), SHUT_WR);
    const TimePoint until = Clock::System().Now() + std::chrono::seconds(2);
    loop->Run([&] {
      char buffer[65536];
      ssize_t got = 0;
      while ((got = recv(client.get(), buffer, sizeof(buffer), MSG_DONTWAIT)) > 0) {
      }
      const bool over = got == 0 || errno != EAGAIN;
      if (over) loop->Stop();
      const TimePoint now = Clock::System().Now();
      if (now > until) abort();  // the receiver hangs on to a connection that has ended
      receiver.Tick(now);
      return now + std::chrono::milliseconds(1);
    });
  }
  for (const std::byte b : guarded) {
    if (b != std::byte{7}) abort();  // no ticket names this region
  }
  memory.CloseAll();
  if (memory.num_open() != 0) abort();  // a pin was left behind
  if (landing.num_entries() != 0) abort();
  return 0;
}
