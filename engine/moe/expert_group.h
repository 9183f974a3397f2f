#pragma once
// Expert parallelism: one model over several ranks. Attention is data-parallel, a rank has requests and KV
// pages of its own; routed experts are shared out. The seam between a backend and the way ranks exchange
// rows.
//
// Ranks compute in lockstep. A *pass* is a sequence of MoE layers that all ranks go through together, a rank
// without work with no rows. A layer is two exchanges: Dispatch shows every rank the rows and the experts
// that they go to; Combine shows the products. Products are returned per (row, expert), unscaled, and added
// at home in ascending order of experts, the order of a single process: so results do not depend, not by a
// bit, on the number of ranks, on who holds an expert, or on batch mates.
//
// Membership has an epoch. When a rank is lost, every exchange of the others ends with Aborted; they begin
// the pass again in the next epoch without it. Forward is a pure function of its inputs, so beginning again
// is safe. A rank that finds itself cast out (it stalled) gets FailedPrecondition and must end.

#include <cstddef>
#include <cstdint>
#include <functional>
#include <optional>
#include <span>
#include <vector>

#include "base/status.h"
#include "engine/moe/expert_placement.h"

namespace millrace::engine {

// Must agree among ranks.
struct GroupShape {
  int32_t num_ranks = 1;
  int32_t num_layers = 0;  // MoE layers, the MTP layer's included
  int32_t num_experts = 0;
  int32_t experts_per_token = 0;
  int32_t hidden_size = 0;
  int32_t rows_max = 0;  // of one rank in a pass
  size_t row_bytes = 0;  // of a row as products want it, a multiple of 64
  uint64_t digest = 0;   // of model, weight format and kernels: equal digests give equal bits
};

// Ordered: when ranks want different passes, the least one that is not kIdle begins.
enum class PassKind : int32_t {
  kIdle,   // no layers
  kDraft,  // the MTP layer
  kStep,   // every main layer, and the MTP layer if some rank has rows for it
};

struct GroupPass {
  PassKind kind = PassKind::kIdle;
  bool mtp = false;      // kStep: the MTP layer runs too
  bool covered = false;  // some living rank holds each expert; else the pass is kIdle
};

// Rows of one rank in the current layer; memory of the group, valid until Combine returns.
struct GroupRows {
  int32_t count = 0;
  const std::byte* rows = nullptr;   // [count] of row_bytes
  const int32_t* experts = nullptr;  // [count, experts_per_token]
  const uint8_t* owners = nullptr;   // [count, experts_per_token]: the rank that computes
};

// One rank's side. Engine thread, except where said. Every wait is bounded.
class ExpertGroup {
 public:
  virtual ~ExpertGroup() = default;  // leaves: the others go on without this rank
  virtual int32_t rank() const = 0;
  virtual const GroupShape& shape() const = 0;
  virtual RankMask alive() const = 0;  // any thread
  virtual uint32_t epoch() const = 0;  // any thread

  // Waits until every living rank has come here, and says which pass all of them begin now. Takes the current
  // membership.
  virtual StatusOr<GroupPass> BeginPass(PassKind wanted, bool mtp_rows) = 0;

  // Where this rank's rows of the next layer are written before Dispatch: [rows_max] each.
  virtual std::byte* outgoing_rows() = 0;
  virtual int32_t* outgoing_experts() = 0;
  virtual uint8_t* outgoing_owners() = 0;
  virtual Status Dispatch(int32_t num_rows) = 0;
  // No rows for a rank that is not alive. A rank that has been cast out without knowing it sees anything.
  virtual GroupRows From(int32_t rank) const = 0;
  // Membership is what it was when the pass began.
  virtual bool current() const = 0;
  // Where the products for `home` go: [n, hidden_size] fp32, its (row, slot) pairs that this rank owns, in
  // order.
  virtual float* ProductsFor(int32_t home) = 0;
  virtual Status Combine() = 0;
  // What `owner` computed for this rank, in the same order; valid until the next Dispatch.
  virtual const float* ProductsOf(int32_t owner) const = 0;

  // Holders of an expert among the living. Changes in BeginPass only, and is the same on every rank during a
  // pass.
  virtual RankMask Holders(int32_t layer, int32_t expert) const = 0;
  // Tells that this rank holds an expert from the next pass on, or no longer does; between passes. A dropped
  // expert's weights must stay until that pass has begun.
  virtual void SetHeld(int32_t layer, int32_t expert, bool held) = 0;
  // This rank's routing decisions, one expert each, for balance.
  virtual void CountLoad(int32_t layer, std::span<const int32_t> experts) = 0;

  // True while another rank waits for this one to take part in a pass, or a SetHeld waits to be told.
  virtual bool JoinWanted() = 0;
  // `wake` is called, from another thread, when JoinWanted may have become true; until the group goes.
  virtual void OnJoinWanted(std::function<void()> wake) = 0;

  // A number that this rank tells the others, for whoever runs it (the port that it serves on), and theirs;
  // 0 before. Any thread.
  virtual void Announce(uint32_t number) = 0;
  virtual std::vector<uint32_t> Announced() const = 0;  // [num_ranks]; 0 for ranks that are not alive

  // Balance. Any thread. Routing decisions so far of every living rank, [layers, experts].
  virtual std::vector<uint64_t> Loads() const = 0;
  // Who holds what now, dead ranks left out; [layers] of [experts].
  virtual std::vector<LayerPlacement> HeldNow() const = 0;
  // The lowest living rank leads: it says who shall hold what in an epoch. Others read that; nothing while it
  // has said none in this one.
  virtual bool leads() const = 0;
  virtual void SetTarget(uint32_t epoch, std::span<const LayerPlacement> target) = 0;
  virtual std::optional<std::vector<LayerPlacement>> Target() const = 0;
};

}  // namespace millrace::engine
