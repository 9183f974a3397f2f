#pragma once
// A transfer engine in virtual time: the production ticket table over a small model of what carries bytes.
// Slices of one request arrive in any order, half of their bytes first and the other half later; a silent
// link or a lost process breaks the connection, after which copies that were on their way may still land.
// Bytes are read from the sender's pages at the last moment, and land in the receiver's, so whoever lets go
// of pages too early shows.

#include <cstddef>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "tests/sim/model_engine.h"
#include "tests/sim/process.h"
#include "transfer/memory_table.h"
#include "transfer/transfer.h"

namespace millrace::sim {

struct TransferBugs {
  bool close_at_once = false;     // the owner's fence does not wait
  bool cancel_at_once = false;    // the writer's fence does not wait
  bool close_forgotten = false;   // nor does it ever answer
  bool flush_is_success = false;  // what was torn down counts as written
  bool damage = false;            // a bit of what lands is wrong, and nobody notices on the way
};

class ModelTransfer;

// All of them; who is where, and what the checkers are told.
struct TransferWorld {
  World* world = nullptr;
  Random* random = nullptr;
  Network* network = nullptr;
  TransferBugs bugs;
  std::function<void(const std::string&)> violation;
  std::map<uint64_t, ModelTransfer*> by_epoch;
};

// On its process's transfer thread.
class ModelTransfer final : public transfer::Transfer {
 public:
  ModelTransfer(TransferWorld* all, Process* process, ModelEngine* engine);

  void OnDeath();  // of its process: every connection is gone
  // "" when no request waits and no ticket is open, else what is left.
  std::string Left() const;

  StatusOr<transfer::RegionId> Register(std::span<std::byte> memory, bool writable) override;
  Status Deregister(transfer::RegionId region) override { return table_.Deregister(region); }
  std::string Descriptor() const override { return std::to_string(process_->epoch); }
  uint64_t epoch() const override { return process_->epoch; }
  StatusOr<transfer::PeerId> Open(const std::string& descriptor) override;
  StatusOr<std::shared_ptr<transfer::IntentList>> Prepare(std::vector<transfer::Intent>) override {
    return Unimplemented("nobody prepares here");
  }
  Status Submit(transfer::PeerId peer, transfer::Request request, transfer::RequestDone done) override;
  void Cancel(transfer::PeerId peer, transfer::TicketId ticket, transfer::TicketDone done) override;
  StatusOr<transfer::TicketId> OpenTicket(uint64_t peer_epoch, std::vector<transfer::Range> ranges,
                                          transfer::Operation operation) override {
    return table_.Open(peer_epoch, std::move(ranges), operation);
  }
  Status ExtendTicket(transfer::TicketId ticket, std::vector<transfer::Range> ranges) override {
    return table_.Extend(ticket, std::move(ranges));
  }
  void CloseTicket(transfer::TicketId ticket, transfer::TicketDone done) override;
  transfer::Snapshot TakeSnapshot() const override { return {}; }

 private:
  struct Write {
    uint64_t peer = 0;  // epoch
    transfer::TicketId ticket = 0;
    int slices_left = 0;
    bool over = false;
    transfer::RequestDone done;
  };
  // One copy of a slice on its way.
  struct Slice {
    std::shared_ptr<Write> write;  // shared with the other slices
    transfer::Intent intent;
    TimePoint sent_at;
    bool terminal = false;        // for the sender: answered, or its connection is gone
    std::vector<std::byte> copy;  // of a torn connection: what was on its way
    ModelTransfer* to = nullptr;  // while it lands
    std::byte* target = nullptr;  // likewise: pinned
    TimePoint landing_since{};
  };
  using SlicePtr = std::shared_ptr<Slice>;  // shared by the sender and by what is on its way

  void Launch(const std::shared_ptr<Write>& write, const transfer::Intent& intent);
  void Arrive(const SlicePtr& slice);
  void Land(const SlicePtr& slice);
  void Copy(const SlicePtr& slice, ModelTransfer* to, size_t from, size_t until);
  void Answer(const SlicePtr& slice, const Status& status);
  void Look(const SlicePtr& slice);
  void BreakConnection(uint64_t peer);
  void Lose(uint64_t peer);
  void EndSlice(const SlicePtr& slice, const Status& status);
  void EndWrite(const std::shared_ptr<Write>& write, const Status& status);
  void AnswerFences();
  bool InFlight(uint64_t peer, transfer::TicketId ticket) const;
  ModelTransfer* Peer(uint64_t peer) const;
  bool Passes(const ModelTransfer* to) const;
  void CheckHeld(const ModelEngine& engine, uint64_t offset, uint64_t bytes, const char* what);

  TransferWorld* const all_;
  Process* const process_;
  ModelEngine* const engine_;
  transfer::MemoryTable table_;
  std::vector<uint64_t> peers_;  // epochs; PeerId is the index + 1
  std::vector<SlicePtr> in_flight_;
  std::vector<std::shared_ptr<Write>> writes_;
  struct Fence {
    uint64_t peer = 0;
    transfer::TicketId ticket = 0;
    transfer::TicketDone done;
  };
  std::vector<Fence> fences_;
};

}  // namespace millrace::sim
