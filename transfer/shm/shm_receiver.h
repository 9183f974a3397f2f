#pragma once
// The accepting end of sessions with other processes of this host: admits slices and copies writes into place
// from the writer's memory; holds what is read until the reader has it. Transfer thread only.

#include <memory>
#include <string>
#include <vector>

#include "transfer/rail.h"
#include "transfer/shm/copier.h"

namespace millrace::transfer {

class ShmReceiver {
 public:
  // All outlive the receiver.
  ShmReceiver(const RailEnvironment* environment, Copier* copier, const uint64_t* token);
  ~ShmReceiver();
  // Before the loop runs.
  Status Listen(const std::string& socket_name);
  // Closes sessions whose reader holds a closing ticket for too long, and strangers that say nothing.
  TimePoint Tick(TimePoint now);
  void CloseAll();
  const ReceiverCounters& counters() const { return counters_; }

 private:
  class Session;
  void Accept();

  const RailEnvironment* const environment_;
  Copier* const copier_;
  const uint64_t* const token_;
  UniqueFd listener_;
  std::vector<std::unique_ptr<Session>> sessions_;
  ReceiverCounters counters_;
};

}  // namespace millrace::transfer
