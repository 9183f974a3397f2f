#pragma once
// Two transfer engines and memory on both sides.

#include <gtest/gtest.h>

#include <algorithm>
#include <cstdlib>
#include <future>
#include <memory>
#include <thread>
#include <vector>

#include "base/random.h"
#include "transfer/tcp/interfaces.h"
#include "transfer/transfer.h"

namespace millrace::transfer {

inline bool HasV6() {
  const auto all = LocalAddresses();
  return all.ok() && std::any_of(all->begin(), all->end(), [](const auto& a) { return a.host == "::1"; });
}

// The rails that a test runs over: 0 = within the process, n = TCP on 127.0.0.1 ... 127.0.0.n.
inline Options RailOptions(int rails) {
  Options options;
  for (int i = 1; i <= rails; ++i) options.listen.push_back(fmt::format("127.0.0.{}:0", i));
  return options;
}

// What the conformance suite runs on.
struct RailCase {
  std::string name;                                             // of the test
  Options options;                                              // of both sides
  std::string skip;                                             // not empty: why it cannot run here
  std::vector<std::string> receiver_include = options.include;  // where the sides differ
};
inline std::vector<RailCase> RailCases() {
  // Set where there are RDMA devices: the patterns of the sender's and of the receiver's. Then only they are
  // tested.
  const char* const senders = std::getenv("MILLRACE_TEST_RDMA_SENDER");
  const char* const receivers = std::getenv("MILLRACE_TEST_RDMA_RECEIVER");
  if (senders != nullptr && receivers != nullptr) {
    Options rdma = RailOptions(1);
    rdma.kinds = {"rdma"};
    rdma.include = {senders};
    return {{"Rdma", rdma, "", {receivers}}};
  }
  Options v6;
  v6.listen = {"[::1]:0"};
  Options found;
  found.listen = {"auto"};
  found.include = {"lo"};
  Options shm;
  shm.kinds = {"shm"};
  return {{"Local", RailOptions(0), ""}, {"Shm", shm, ""},
          {"Tcp1", RailOptions(1), ""},  {"Tcp2", RailOptions(2), ""},
          {"Tcp3", RailOptions(3), ""},  {"TcpV6", v6, HasV6() ? "" : "this host has no ::1"},
          {"TcpAuto", found, ""}};
}

inline std::vector<std::byte> RandomBytes(size_t count, uint64_t seed) {
  Random random(seed);
  std::vector<std::byte> bytes(count);
  for (std::byte& byte : bytes) byte = static_cast<std::byte>(random.Next());
  return bytes;
}

// One side: an engine and a region.
struct Side {
  Side(const Options& options, size_t bytes, bool writable, uint64_t seed)
      : memory(RandomBytes(bytes, seed)), transfer(*Transfer::Create(options)) {
    region = *transfer->Register(memory, writable);
  }
  std::vector<std::byte> memory;  // outlives the engine
  std::unique_ptr<Transfer> transfer;
  RegionId region = 0;
};

// Submits and waits; the status of the submission or of the request.
inline Status SubmitAndWait(Transfer& transfer, PeerId peer, Request request) {
  auto done = std::make_shared<std::promise<Status>>();
  auto future = done->get_future();
  const Status status = transfer.Submit(peer, std::move(request),
                                        [done](Status result) { done->set_value(std::move(result)); });
  if (!status.ok()) return status;
  if (future.wait_for(std::chrono::seconds(30)) != std::future_status::ready)
    return Internal("the request never ended");
  return future.get();
}

// Closes the ticket and waits for the fence; how long it took.
inline Duration CloseAndWait(Transfer& transfer, TicketId ticket) {
  const TimePoint start = Clock::System().Now();
  auto done = std::make_shared<std::promise<void>>();
  auto future = done->get_future();
  transfer.CloseTicket(ticket, [done] { done->set_value(); });
  EXPECT_EQ(future.wait_for(std::chrono::seconds(30)), std::future_status::ready);
  return Clock::System().Now() - start;
}

template <typename Condition>
bool Eventually(Condition condition, Duration within = std::chrono::seconds(10)) {
  const TimePoint until = Clock::System().Now() + within;
  while (!condition()) {
    if (Clock::System().Now() > until) return false;
    std::this_thread::sleep_for(std::chrono::milliseconds(2));
  }
  return true;
}

inline Request OneIntent(TicketId ticket, RegionId source, uint64_t source_offset, uint64_t bytes,
                         RegionId remote, uint64_t remote_offset) {
  Request request;
  request.ticket = ticket;
  request.intents.push_back({{source, source_offset, bytes}, remote, remote_offset});
  return request;
}

inline Request OneRead(TicketId ticket, RegionId local, uint64_t local_offset, uint64_t bytes,
                       RegionId remote, uint64_t remote_offset) {
  Request request = OneIntent(ticket, local, local_offset, bytes, remote, remote_offset);
  request.operation = Operation::kRead;
  return request;
}

}  // namespace millrace::transfer
