#pragma once
// Tokens to the ranks that own their experts, and the weighted sums back, by stores of each rank into windows
// of its peers (peer-to-peer memory of one host). Four launches per MoE layer and rank, in stream order:
//
//   Dispatch  writes each token once into every rank that owns one of its experts, then a flag into every
//   rank Receive   waits for all flags and makes the choices that this rank serves Return    sums a token's
//   outputs on this rank (fp32, in order of choice), writes the sum as bf16 to the
//             token's rank, then a flag into every rank
//   Combine   waits for all flags and adds the sums (fp32, in order of rank) to the residual stream
//
// So the result differs from one rank's by one rounding to bf16 per rank and the order of an fp32 sum; it is
// the same on every run. All ranks call with the same `rows` (an idle rank with tokens that choose nothing).
//
// A token's place in a peer's window is its own index: no counters, no dependence on the other tokens, and
// every rank writes only to places of its own. A window needs no second copy: a rank writes again only after
// Combine has seen all ranks' Return, which follows the last read of what Dispatch wrote; and Return writes
// again only after Receive has seen the next Dispatch of all, which follows their Combine.
//
// If a rank stored its data, released flag `epoch` to a peer, and the peer acquired it, the peer sees the
// data. A flag that does not come within `timeout_ns` ends in the error word; from then on nothing waits, no
// choice is served and the step's result is void. Nothing here allocates or synchronises with the host;
// epochs are counted on the device, so a captured graph may be replayed.

#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

namespace millrace::engine::cuda {

inline constexpr int32_t kEpRanksMax = 8;
inline constexpr int32_t kEpTopKMax = 16;
inline constexpr int32_t kEpScaleBlock = 128;

// What a token is sent as: e4m3 with an fp32 scale per 128 as LaunchQuantizeRows makes them.
enum class EpPayload { kBf16, kE4m3 };

struct EpShape {
  int32_t ranks = 1;
  int32_t rows_max = 0;  // tokens of a rank in one exchange
  int32_t hidden = 0;    // a multiple of 8; of 128 for kE4m3
  int32_t top_k = 0;
  EpPayload payload = EpPayload::kBf16;
};

// The memory of one rank that its peers write. [rows] arrays are packed for the rows of the call.
struct EpWindow {
  uint64_t* dispatched = nullptr;  // [ranks] epoch << 32 | rows of the last Dispatch of each rank
  uint64_t* returned = nullptr;    // [ranks] likewise of Return
  uint32_t* chosen = nullptr;      // [ranks, rows] bit j: choice j of the token is an expert of this rank
  int32_t* experts = nullptr;      // [ranks, rows, top_k] number of that expert here; other places undefined
  float* weights = nullptr;        // [ranks, rows, top_k] likewise
  std::byte* tokens = nullptr;     // [ranks, rows, hidden] bf16 or e4m3, of tokens with a choice here
  float* scales = nullptr;         // [ranks, rows, hidden / 128], kE4m3
  __nv_bfloat16* partial = nullptr;  // [rows, ranks, hidden] sums of the ranks that the token went to
};
// Lays a window out at `base`; returns its bytes (base null: only that).
size_t PlaceEpWindow(const EpShape& shape, std::byte* base, EpWindow* window);

// Where an expert is: rank << 16 | its number there.
inline constexpr uint32_t EpPlace(int32_t rank, int32_t local) {
  return static_cast<uint32_t>(rank) << 16 | static_cast<uint32_t>(local);
}

// Error word: phases << 16 | mask of ranks that did not come (kRows: that came with other rows); 0 while all
// is well. Bits are added, never taken away.
enum class EpPhase : uint32_t { kDispatch = 1, kReturn = 2, kRows = 4 };

// A rank's own state, in its device memory.
struct EpControl {
  uint32_t epoch = 0;  // of the last Dispatch
  uint32_t alive = 0;  // mask of the ranks that take part
  uint32_t error = 0;
  uint32_t dispatch_blocks = 0;  // blocks that have finished; 0 between launches
  uint32_t return_blocks = 0;
};

// What all four launches need.
struct EpGroup {
  EpShape shape;
  int32_t rank = 0;
  EpWindow windows[kEpRanksMax];  // of each rank, as this device sees them
  EpControl* control = nullptr;
  uint32_t* host_error = nullptr;  // page-locked host memory, as the device sees it: a copy of control->error
  const uint32_t* places = nullptr;  // [experts of the model] EpPlace
  int64_t timeout_ns = 0;            // of one wait
  // Blocks of one launch that wait for flags, at most: ranks that share a device (tests) must leave room for
  // each other's launches, or none would end.
  int32_t waiting_blocks_max = 0;
};

struct EpDispatchArgs {
  EpGroup group;
  const __nv_bfloat16* x = nullptr;  // [rows, hidden]
  const int32_t* experts = nullptr;  // [rows, top_k], -1: no choice
  const float* weights = nullptr;    // [rows, top_k]
  int32_t rows = 0;
};
cudaError_t LaunchEpDispatch(const EpDispatchArgs& args, cudaStream_t stream);

// After it the choices are ready for LaunchSortSlots (rows = ranks * rows, no shared experts) and the
// window's tokens and scales are the input of LaunchGroupedGemm*.
struct EpReceiveArgs {
  EpGroup group;
  int32_t* experts = nullptr;     // [ranks * rows, top_k] local experts, written; -1: not served here
  float* weights = nullptr;       // [ranks * rows, top_k], written; 0 likewise
  int32_t* valid_rows = nullptr;  // written: ranks * rows
  int32_t rows = 0;
};
cudaError_t LaunchEpReceive(const EpReceiveArgs& args, cudaStream_t stream);

struct EpReturnArgs {
  EpGroup group;
  const __nv_bfloat16* expert_out = nullptr;  // [ranks * rows, top_k, hidden], multiplied by the weights
  int32_t rows = 0;
};
cudaError_t LaunchEpReturn(const EpReturnArgs& args, cudaStream_t stream);

struct EpCombineArgs {
  EpGroup group;
  const int32_t* experts = nullptr;  // as given to Dispatch
  const __nv_bfloat16* local =
      nullptr;                         // [rows, hidden] added after the ranks' sums (shared experts), or null
  float* residual = nullptr;           // [rows, hidden], added to
  const float* norm_weight = nullptr;  // [hidden], or null: no norm
  __nv_bfloat16* normed = nullptr;     // [rows, hidden], written with norm_weight
  int32_t rows = 0;
  float eps = 0;
};
cudaError_t LaunchEpCombine(const EpCombineArgs& args, cudaStream_t stream);

}  // namespace millrace::engine::cuda
