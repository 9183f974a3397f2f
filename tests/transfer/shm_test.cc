// The shared-memory rail against processes that die, stop, lie, or come late. A raw client speaks its
// messages by hand.
#include <poll.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <optional>

#include "harness.h"
#include "proto/transfer.pb.h"
#include "transfer/shm/shm_socket.h"

namespace millrace::transfer {
namespace {

Options ShmOptions() {
  Options options;
  options.kinds = {"shm"};
  return options;
}

class RawSession {
 public:
  explicit RawSession(const std::string& descriptor) {
    v1::PeerDescriptor peer;
    EXPECT_TRUE(peer.ParseFromString(descriptor));
    epoch_ = peer.epoch();
    for (const auto& rail : peer.rails()) {
      if (rail.kind() == "shm") fd_ = *ShmConnect(rail.address().substr(rail.address().find('/') + 1));
    }
    EXPECT_TRUE(fd_.valid());
  }
  void Send(const ShmMessage& message) { EXPECT_EQ(ShmSend(fd_.get(), message), ShmIo::kDone); }
  // Nothing when the session is closed.
  std::optional<ShmMessage> Receive() {
    pollfd ready{fd_.get(), POLLIN, 0};
    EXPECT_EQ(poll(&ready, 1, 10'000), 1) << "no answer";
    ShmMessage message;
    if (ShmReceive(fd_.get(), &message) != ShmIo::kDone) return std::nullopt;
    return message;
  }
  std::optional<ShmMessage> Ask(const ShmMessage& message) {
    Send(message);
    return Receive();
  }
  // Says Hello with a token that is `lie` off.
  ShmCode Hello(uint64_t own_epoch, uint64_t expected = 0, uint64_t lie = 0) {
    const auto answer = Ask({.kind = ShmKind::kHello,
                             .slice = own_epoch,
                             .ticket = expected == 0 ? epoch_ : expected,
                             .offset = token_ + lie,
                             .address = reinterpret_cast<uint64_t>(&token_)});
    EXPECT_TRUE(answer.has_value() && answer->kind == ShmKind::kHelloAnswer);
    return answer.has_value() ? answer->code : ShmCode::kRefused;
  }

 private:
  UniqueFd fd_;
  uint64_t epoch_ = 0;
  const uint64_t token_ = RandomId();
};

constexpr uint64_t kEpoch = 4711;
constexpr size_t kMemory = 4 << 20;

class Shm : public testing::Test {
 protected:
  Side owner_{ShmOptions(), kMemory, true, 1};
  RawSession session_{owner_.transfer->Descriptor()};
  std::vector<std::byte> source_ = RandomBytes(kMemory, 2);

  TicketId Grant(Operation operation) {
    return *owner_.transfer->OpenTicket(kEpoch, {{owner_.region, 0, kMemory}}, operation);
  }
  ShmMessage WriteOf(TicketId ticket, uint64_t slice, uint32_t attempt, const void* from, uint32_t bytes) {
    return {.kind = ShmKind::kWrite,
            .slice = slice,
            .ticket = ticket,
            .address = reinterpret_cast<uint64_t>(from),
            .region = owner_.region,
            .length = bytes,
            .attempt = attempt};
  }
};

TEST_F(Shm, AStrangerIsRefused) {
  EXPECT_EQ(session_.Hello(kEpoch, /*expected=*/99), ShmCode::kOtherProcess);
  EXPECT_FALSE(session_.Receive().has_value()) << "the session is closed";
  RawSession liar(owner_.transfer->Descriptor());
  EXPECT_EQ(liar.Hello(kEpoch, 0, /*lie=*/1), ShmCode::kNoAccess) << "memory that is not what was promised";
  RawSession silent(owner_.transfer->Descriptor());
  silent.Send(WriteOf(Grant(Operation::kWrite), 1, 1, source_.data(), 100));
  EXPECT_FALSE(silent.Receive().has_value()) << "a slice before Hello";
}

TEST_F(Shm, AnOlderCopyNeverLandsOverANewerOne) {
  ASSERT_EQ(session_.Hello(kEpoch), ShmCode::kDone);
  const TicketId ticket = Grant(Operation::kWrite);
  auto answer = session_.Ask(WriteOf(ticket, 1, 2, source_.data(), 100'000));
  ASSERT_TRUE(answer.has_value());
  EXPECT_EQ(answer->code, ShmCode::kDone);
  answer = session_.Ask(WriteOf(ticket, 1, 1, source_.data() + 5, 100'000));
  ASSERT_TRUE(answer.has_value());
  EXPECT_EQ(answer->code, ShmCode::kSuperseded);
  EXPECT_TRUE(std::equal(source_.begin(), source_.begin() + 100'000, owner_.memory.begin()));
}

TEST_F(Shm, ASourceThatIsGoneCostsTheSessionAndHoldsNothing) {
  ASSERT_EQ(session_.Hello(kEpoch), ShmCode::kDone);
  const TicketId ticket = Grant(Operation::kWrite);
  void* const page = mmap(nullptr, 1 << 20, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  EXPECT_FALSE(session_.Ask(WriteOf(ticket, 1, 1, page, 1 << 20)).has_value()) << "closed";
  munmap(page, 1 << 20);
  EXPECT_LT(CloseAndWait(*owner_.transfer, ticket), std::chrono::milliseconds(500));
}

TEST_F(Shm, AReaderThatStopsLosesItsSession) {
  ASSERT_EQ(session_.Hello(kEpoch), ShmCode::kDone);
  const TicketId ticket = Grant(Operation::kRead);
  const auto readable = session_.Ask(
      {.kind = ShmKind::kRead, .slice = 1, .ticket = ticket, .region = owner_.region, .length = 4096});
  ASSERT_TRUE(readable.has_value() && readable->kind == ShmKind::kReadable);
  EXPECT_EQ(readable->address, reinterpret_cast<uint64_t>(owner_.memory.data()));
  const Duration took = CloseAndWait(*owner_.transfer, ticket);
  EXPECT_GE(took, std::chrono::milliseconds(100)) << "what is being read is held";
  EXPECT_LT(took, std::chrono::seconds(2));
  EXPECT_FALSE(session_.Receive().has_value()) << "no confirmation, so nothing that it read counts";
}

// What the owner tells the writer of another process, and the writer's epoch the other way.
class Pipe {
 public:
  Pipe() { EXPECT_EQ(pipe(fds_), 0); }
  ~Pipe() {
    close(fds_[0]);
    close(fds_[1]);
  }
  void Put(const void* data, size_t size) {
    EXPECT_EQ(write(fds_[1], data, size), static_cast<ssize_t>(size));
  }
  void Get(void* data, size_t size) {
    for (size_t done = 0; done < size;) {
      const ssize_t got = read(fds_[0], static_cast<char*>(data) + done, size - done);
      if (got <= 0) _exit(1);  // the other process is gone
      done += static_cast<size_t>(got);
    }
  }

 private:
  int fds_[2] = {-1, -1};
};

struct Order {
  TicketId ticket = 0;
  RegionId region = 0;
  uint32_t descriptor_bytes = 0;  // which follow
};

[[noreturn]] void WriteUntilKilled(Pipe& orders, Pipe& epochs) {
  const Side side(ShmOptions(), kMemory, false, 5);
  const uint64_t epoch = side.transfer->epoch();
  epochs.Put(&epoch, sizeof(epoch));
  Order order;
  orders.Get(&order, sizeof(order));
  std::string descriptor(order.descriptor_bytes, '\0');
  orders.Get(descriptor.data(), descriptor.size());
  const PeerId peer = *side.transfer->Open(descriptor);
  while (true) {
    (void)SubmitAndWait(*side.transfer, peer,
                        OneIntent(order.ticket, side.region, 0, kMemory, order.region, 0));
  }
}

TEST(ShmProcesses, AKilledWriterHoldsNothing) {
  Pipe orders;
  Pipe epochs;
  const pid_t writer = fork();  // before any thread of this test
  if (writer == 0) WriteUntilKilled(orders, epochs);
  Side owner(ShmOptions(), kMemory, true, 1);
  uint64_t epoch = 0;
  epochs.Get(&epoch, sizeof(epoch));
  const std::string descriptor = owner.transfer->Descriptor();
  const Order order{*owner.transfer->OpenTicket(epoch, {{owner.region, 0, kMemory}}), owner.region,
                    static_cast<uint32_t>(descriptor.size())};
  orders.Put(&order, sizeof(order));
  orders.Put(descriptor.data(), descriptor.size());
  EXPECT_TRUE(Eventually([&] { return owner.transfer->TakeSnapshot().bytes_received > 4 * kMemory; }));
  kill(writer, SIGKILL);
  EXPECT_LT(CloseAndWait(*owner.transfer, order.ticket), std::chrono::seconds(1));
  std::fill(owner.memory.begin(), owner.memory.end(), std::byte{0});
  EXPECT_EQ(waitpid(writer, nullptr, 0), writer);
  EXPECT_TRUE(std::all_of(owner.memory.begin(), owner.memory.end(),
                          [](std::byte byte) { return byte == std::byte{0}; }));
  EXPECT_EQ(owner.transfer->TakeSnapshot().draining_tickets, 0);
  EXPECT_TRUE(owner.transfer->Deregister(owner.region).ok());
}

}  // namespace
}  // namespace millrace::transfer
