#pragma once
// One rank's part of an exchange between the ranks of an expert-parallel group on one host: its window, state
// and placement table. The protocol and what holds of it: kernels/ep_exchange.h. Builds without the rest of
// Millrace.

#include <cstdint>
#include <memory>
#include <span>
#include <string>

#include "engine/backend/cuda/kernels/ep_exchange.h"
#include "engine/backend/cuda/memory.h"
#include "engine/backend/cuda/result.h"

namespace millrace::engine::cuda {

struct EpExchangeOptions {
  EpShape shape;
  int32_t rank = 0;
  int32_t num_experts = 0;        // of the model
  int64_t timeout_ns = 50000000;  // of one wait for the other ranks; a step waits at most once that long
  int32_t ranks_on_device = 1;    // more only where a test lets ranks share a device
};

// Belongs to the device that is current at creation, and one thread at a time uses it. The four launches go
// to one stream in the order of kernels/ep_exchange.h, may be captured in a graph, and never wait on the
// host.
class EpExchange {
 public:
  static Result Create(const EpExchangeOptions& options, std::unique_ptr<EpExchange>* exchange);
  ~EpExchange();

  // This rank's window. Ranks in one process pass the pointer (with peer access between their devices); other
  // processes open its cudaIpcMemHandle_t. It must outlive every peer's last launch.
  std::span<std::byte> window() const { return {window_.data(), window_.bytes()}; }
  // The windows of all ranks in order, as this device sees them; this rank's own entry is ignored.
  Result Connect(std::span<std::byte* const> windows);

  // Membership: which ranks take part from the next Dispatch on, and where each expert is (EpPlace; one rank
  // may be given another replica of an expert than its peers). Every rank calls it with the same `alive` and
  // `first_epoch`, above every epoch used before, while no launch of its own is running; a peer may be a step
  // ahead. Clears the error word. A rank that is left out and comes back late harms nobody: it writes only to
  // places of its own, which nobody reads.
  Result SetMembers(uint32_t alive, std::span<const uint32_t> places, uint32_t first_epoch);

  Result Dispatch(const __nv_bfloat16* x, const int32_t* experts, const float* weights, int32_t rows,
                  cudaStream_t stream);
  Result Receive(int32_t* experts, float* weights, int32_t* valid_rows, int32_t rows, cudaStream_t stream);
  Result Return(const __nv_bfloat16* expert_out, int32_t rows, cudaStream_t stream);
  Result Combine(EpCombineArgs args, cudaStream_t stream);  // args.group is filled in here

  // What the other ranks sent, after Receive: [ranks * rows, hidden], and scales for kE4m3.
  const std::byte* tokens() const { return own().tokens; }
  const float* scales() const { return own().scales; }

  // What has gone wrong since SetMembers, in one line; reads host memory only. Valid for a step once its
  // stream has been synchronised.
  Result Check() const;
  uint32_t missing() const { return *error() & 0xffff; }  // ranks named by Check

 private:
  explicit EpExchange(const EpExchangeOptions& options) : options_(options) {}
  const EpWindow& own() const { return group_.windows[options_.rank]; }
  const volatile uint32_t* error() const { return reinterpret_cast<const volatile uint32_t*>(error_.data()); }

  const EpExchangeOptions options_;
  EpGroup group_;
  DeviceMemory window_;
  DeviceMemory state_;  // EpControl, then places
  PinnedMemory error_;
};

}  // namespace millrace::engine::cuda
