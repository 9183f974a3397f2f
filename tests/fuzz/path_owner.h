#pragma once
// Who a path belongs to in a fuzzer: sends a write, a read and a probe once it is connected, and sends again
// what comes back while the path is not said to be broken, as Peer does. Ends the process when a slice is
// reported that is not under way.

#include <cstdlib>
#include <set>
#include <span>

#include "transfer/path.h"

namespace millrace::transfer {

struct FuzzPathOwner : PathOwner {
  void OnConnected(Path* path) override {
    // Once: a path that is connected again has nothing to carry.
    if (connected++ > 0) return;
    SendSlice(path, Operation::kWrite);
    if (!broken) SendSlice(path, Operation::kRead);
    if (!broken) path->Probe(3);
  }
  void OnBroken(Path* path, const Status&) override {
    broken = true;
    path->Disconnect();
  }
  void OnSliceDone(Path* path, uint64_t slice, SliceOutcome outcome) override {
    if (under_way.erase(slice) == 0) abort();
    if (outcome == SliceOutcome::kUnknown && !broken && next < 10) SendSlice(path, Operation::kWrite);
  }
  void SendSlice(Path* path, Operation operation) {
    Slice slice;
    slice.id = next++;
    slice.operation = operation;
    slice.local = memory;
    slice.local_region = region;
    under_way.insert(slice.id);
    path->Send(slice);
  }
  void OnProbeDone(Path*, uint64_t) override {}
  void OnRefused(const Status&) override {}

  std::span<std::byte> memory;  // the local side of every slice
  RegionId region = 0;          // that it is in
  int connected = 0;
  uint64_t next = 1;
  std::set<uint64_t> under_way;
  bool broken = false;
};

}  // namespace millrace::transfer
