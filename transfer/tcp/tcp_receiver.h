#pragma once
// The receiving end: listening rails and the connections that peers made to them. Payload goes from the
// socket straight into the granted memory, after ticket, epoch and range were checked. Transfer thread only.

#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "base/net.h"
#include "transfer/event_loop.h"
#include "transfer/memory_table.h"
#include "transfer/tcp/socket.h"
#include "transfer/wire.h"

namespace millrace::transfer {

struct ReceiverCounters {
  uint64_t bytes_received = 0;
  uint64_t slices_refused = 0;  // by ticket, epoch or range, or with a wrong checksum
};

class TcpReceiver {
 public:
  TcpReceiver(EventLoop* loop, MemoryTable* memory, uint64_t own_epoch);
  ~TcpReceiver();
  // Before the loop runs, or on its thread.
  Status Listen(const HostPort& address, HostPort* bound);
  // Closes connections that are stuck in a slice of a closing ticket, and strangers that say nothing.
  TimePoint Tick(TimePoint now);
  // Closes everything: nothing lands any more.
  void CloseAll();
  const ReceiverCounters& counters() const { return counters_; }

 private:
  class Connection;
  void Accept(int listener);

  EventLoop* const loop_;
  MemoryTable* const memory_;
  const uint64_t epoch_;
  std::vector<UniqueFd> listeners_;
  std::vector<std::unique_ptr<Connection>> connections_;
  ReceiverCounters counters_;
};

}  // namespace millrace::transfer
