#pragma once
// The accepting end: listening rails and the connections that peers made to them. Payload goes from the
// socket straight into the granted memory, after ticket, epoch and range were checked; reads are answered
// from it. Transfer thread only.

#include <memory>
#include <vector>

#include "base/net.h"
#include "transfer/rail.h"

namespace millrace::transfer {

class TcpReceiver {
 public:
  explicit TcpReceiver(const RailEnvironment* environment);  // outlives the receiver
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

  const RailEnvironment* const environment_;
  std::vector<UniqueFd> listeners_;
  std::vector<std::unique_ptr<Connection>> connections_;
  ReceiverCounters counters_;
};

}  // namespace millrace::transfer
