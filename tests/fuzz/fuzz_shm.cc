// What a process of this host may say over a session, in either role: to a receiver with an open ticket for
// writes and one for reads, or to a path with a write, a read and a probe under way.
#include <fuzzer/FuzzedDataProvider.h>
#include <sys/socket.h>
#include <unistd.h>

#include "base/log.h"
#include "tests/fuzz/path_owner.h"
#include "transfer/shm/shm_path.h"
#include "transfer/shm/shm_receiver.h"

using namespace millrace;
using namespace millrace::transfer;

namespace {

constexpr uint64_t kOwnEpoch = 5, kPeerEpoch = 6, kToken = 0x5eed;
constexpr size_t kSmall = 4096, kLarge = 64 << 10;  // copied at once, and on a thread of the copier

const std::string& SocketName() {
  static const std::string name = fmt::format("millrace-fuzz-{}", getpid());
  return name;
}

// `source` is memory that can be read; some of what the stranger says points there.
ShmMessage MessageOf(FuzzedDataProvider& data, const std::vector<std::byte>& source) {
  const auto number = [&]() -> uint64_t {
    return data.ConsumeBool() ? data.ConsumeIntegralInRange<uint64_t>(0, 5)
                              : data.ConsumeIntegral<uint64_t>();
  };
  ShmMessage message;
  message.kind = static_cast<ShmKind>(data.ConsumeIntegralInRange<uint32_t>(0, 11));
  message.code = static_cast<ShmCode>(data.ConsumeIntegralInRange<uint32_t>(0, 5));
  message.slice = number();
  message.ticket = number();
  message.offset = number();
  message.address = data.ConsumeBool()
                        ? number()
                        : reinterpret_cast<uint64_t>(source.data()) + data.ConsumeIntegral<uint8_t>();
  message.retired_below = number();
  message.region = static_cast<uint32_t>(number());
  message.length =
      data.ConsumeBool() ? static_cast<uint32_t>(number()) : data.ConsumeIntegralInRange<uint32_t>(1, kLarge);
  message.attempt = static_cast<uint32_t>(number());
  return message;
}

// Some messages, now and then something that is none. What does not fit into the socket is not said.
void Speak(FuzzedDataProvider& data, int fd, const std::vector<std::byte>& source) {
  for (int i = 0; i < 8 && data.remaining_bytes() > 0; ++i) {
    if (data.ConsumeIntegralInRange(0, 31) == 0) {
      const std::string text = data.ConsumeRandomLengthString(2 * sizeof(ShmMessage));
      (void)!send(fd, text.data(), text.size(), MSG_NOSIGNAL | MSG_DONTWAIT);
    } else {
      (void)ShmSend(fd, MessageOf(data, source));
    }
  }
}

// Takes what was said to the stranger. False: the session is over.
bool Listen(int fd) {
  ShmMessage message;
  ShmIo result = ShmIo::kDone;
  while (result == ShmIo::kDone) result = ShmReceive(fd, &message);
  return result != ShmIo::kClosed;
}

// Runs the loop until the stranger has said everything and `over`; a session that outlives that is a fault.
void Converse(FuzzedDataProvider& data, EventLoop* loop, int fd, const std::vector<std::byte>& source,
              const std::function<bool()>& over) {
  bool hung_up = false;
  const TimePoint until = Clock::System().Now() + std::chrono::seconds(2);
  loop->Run([&] {
    const TimePoint now = Clock::System().Now();
    if (!hung_up) Speak(data, fd, source);
    Listen(fd);
    if (!hung_up && data.remaining_bytes() == 0) {
      hung_up = true;
      shutdown(fd, SHUT_WR);
    }
    if (over()) loop->Stop();
    if (now > until) abort();
    return hung_up ? now + std::chrono::milliseconds(1) : now;
  });
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
  std::vector<std::byte> writable(kLarge), guarded(kSmall, std::byte{7});
  const std::vector<std::byte> source(kLarge + 256);
  const RegionId region = memory.Register(writable, true);
  memory.Register(guarded, true);
  if (!memory.Open(kPeerEpoch, {{region, 0, kLarge}}).ok()) abort();
  if (!memory.Open(kPeerEpoch, {{region, 0, kLarge}}, Operation::kRead).ok()) abort();
  RailEnvironment environment;
  environment.loop = loop.get();
  environment.clock = &Clock::System();
  environment.memory = &memory;
  environment.landing = &landing;
  environment.options = &options;
  environment.epoch = kOwnEpoch;
  // The stranger's Hello, mostly as it ought to be.
  ShmMessage hello{.slice = kPeerEpoch,
                   .ticket = kOwnEpoch,
                   .offset = kToken,
                   .address = reinterpret_cast<uint64_t>(&kToken)};
  const bool polite = data.ConsumeIntegralInRange(0, 9) != 0;
  {
    Copier copier(loop.get(), 1);
    if (data.ConsumeBool()) {
      ShmReceiver receiver(&environment, &copier, &kToken);
      if (!receiver.Listen(SocketName()).ok()) abort();
      const UniqueFd client = *ShmConnect(SocketName());
      hello.kind = ShmKind::kHello;
      if (polite) (void)ShmSend(client.get(), hello);
      Converse(data, loop.get(), client.get(), source, [&] {
        receiver.Tick(Clock::System().Now());
        return data.remaining_bytes() == 0 && !Listen(client.get());
      });
    } else {
      const UniqueFd listener = *ShmListen(SocketName());
      std::vector<std::byte> local(kLarge);
      FuzzPathOwner owner;
      owner.memory = local;
      ShmPath path(&environment, &copier, &kToken, SocketName(), kPeerEpoch);
      path.Attach(&owner);
      path.Connect();
      const UniqueFd server = ShmAccept(listener.get());
      if (!server.valid()) abort();
      hello.kind = ShmKind::kHelloAnswer;
      if (polite) (void)ShmSend(server.get(), hello);
      Converse(data, loop.get(), server.get(), source, [&] { return owner.broken; });
      if (!owner.under_way.empty()) abort();  // a slice that was never reported
    }
    loop->RunRemaining();
  }
  for (const std::byte b : guarded) {
    if (b != std::byte{7}) abort();  // no ticket names this region
  }
  memory.CloseAll();
  if (memory.num_open() != 0) abort();  // a pin was left behind
  if (landing.num_entries() != 0) abort();
  return 0;
}
