#pragma once
// The passive side of transfer-bench: lends memory to initiators and checks what they wrote.

#include <atomic>
#include <list>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "base/net.h"
#include "transfer/transfer.h"

namespace millrace::server {

struct BenchTargetOptions {
  std::string listen = "127.0.0.1:0";  // control; initiators ask here for memory
  transfer::Options transfer;
  size_t memory_bytes_max = size_t{4} << 30;  // lent to all initiators together
};

// One thread accepts, one per initiator session serves; all end in the destructor, which waits for the
// fence of every ticket.
class BenchTarget {
 public:
  static StatusOr<std::unique_ptr<BenchTarget>> Create(const BenchTargetOptions& options);
  ~BenchTarget();
  const HostPort& address() const { return address_; }

 private:
  class Session;
  struct Listener;
  BenchTarget(const BenchTargetOptions& options, std::unique_ptr<transfer::Transfer> transfer);
  void Accept();

  const BenchTargetOptions options_;
  const std::unique_ptr<transfer::Transfer> transfer_;
  std::unique_ptr<Listener> listener_;
  HostPort address_;
  std::atomic<size_t> lent_bytes_{0};
  std::atomic<bool> stopping_{false};
  std::list<std::unique_ptr<Session>> sessions_;  // the accepting thread's until it has ended
  std::thread thread_;
};

}  // namespace millrace::server
