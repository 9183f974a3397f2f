#include "engine/backend/cuda/kernels/combine.cuh"
#include "engine/backend/cuda/kernels/ep_exchange.h"
#include "engine/backend/cuda/kernels/quantize.cuh"

namespace millrace::engine::cuda {
namespace {

constexpr int kThreads = kCombineThreads;
// Blocks of Dispatch and Return: enough to fill the links, few enough for their last one to be told quickly.
constexpr int kBlocksMax = 1024;

// An epoch, and the rows of the call, which all ranks must agree on.
__device__ __forceinline__ uint64_t Flag(uint32_t epoch, int rows) {
  return static_cast<uint64_t>(epoch) << 32 | static_cast<uint32_t>(rows);
}

__device__ __forceinline__ uint64_t LoadAcquireSystem(const uint64_t* address) {
  uint64_t value;
  asm volatile("ld.acquire.sys.global.u64 %0, [%1];" : "=l"(value) : "l"(address) : "memory");
  return value;
}
__device__ __forceinline__ void StoreReleaseSystem(uint64_t* address, uint64_t value) {
  asm volatile("st.release.sys.global.u64 [%0], %1;" ::"l"(address), "l"(value) : "memory");
}
__device__ __forceinline__ int64_t Nanoseconds() {
  int64_t now;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now)::"memory");
  return now;
}

__device__ void Raise(const EpGroup& group, EpPhase phase, int rank) {
  const uint32_t word = static_cast<uint32_t>(phase) << 16 | 1u << rank;
  uint32_t all = atomicOr(&group.control->error, word) | word;
  for (;;) {  // the host's copy ends with every bit, whoever writes last
    *static_cast<volatile uint32_t*>(group.host_error) = all;
    __threadfence_system();
    const uint32_t now = atomicOr(&group.control->error, 0u);
    if (now == all) return;
    all = now;
  }
}

// One thread. Waits for `rank`'s flag of this epoch; false if it did not come or an error stands.
__device__ bool AwaitFlag(const EpGroup& group, const uint64_t* flag, int rank, EpPhase phase, int rows) {
  const uint32_t epoch = group.control->epoch;
  const int64_t begin = Nanoseconds();
  for (;;) {
    if (*static_cast<volatile uint32_t*>(&group.control->error) != 0) return false;
    const uint64_t seen = LoadAcquireSystem(flag);
    // A peer is never ahead: it would first have to see this rank's flag of this epoch.
    if (static_cast<int32_t>(static_cast<uint32_t>(seen >> 32) - epoch) >= 0) {
      if (seen == Flag(epoch, rows)) return true;
      Raise(group, EpPhase::kRows, rank);
      return false;
    }
    if (Nanoseconds() - begin > group.timeout_ns) {
      Raise(group, phase, rank);
      return false;
    }
    __nanosleep(20);
  }
}

// Whole block, at its end: the last block to come tells every living rank that this rank's stores have been
// made.
__device__ void Announce(const EpGroup& group, uint32_t* blocks, bool new_epoch, uint64_t* EpWindow::*flags,
                         int rows) {
  __syncthreads();  // the block's stores come before the fence below
  if (threadIdx.x >= 32) return;
  const int lane = threadIdx.x;
  bool last = false;
  uint32_t epoch = 0;
  if (lane == 0) {
    __threadfence_system();  // this block's stores before its count
    last = atomicAdd(blocks, 1u) == gridDim.x - 1;
    if (last) {
      *blocks = 0;
      __threadfence_system();  // every block's stores, counted above, before the flags below
      epoch = group.control->epoch + (new_epoch ? 1 : 0);
      group.control->epoch = epoch;
    }
  }
  last = __shfl_sync(kFullWarp, last, 0);
  epoch = __shfl_sync(kFullWarp, epoch, 0);
  if (!last || lane >= group.shape.ranks || (group.control->alive >> lane & 1) == 0) return;
  StoreReleaseSystem(group.windows[lane].*flags + group.rank, Flag(epoch, rows));  // AwaitFlag acquires
}

// Lane j gets the place of choice j of a token, ~0 if it has none.
__device__ __forceinline__ uint32_t PlaceOfChoice(const EpGroup& group, const int32_t* experts, int row,
                                                  int lane) {
  if (lane >= group.shape.top_k) return ~0u;
  const int expert = experts[static_cast<int64_t>(row) * group.shape.top_k + lane];
  return expert < 0 ? ~0u : group.places[expert];
}

// Which ranks a token goes to. Every warp of the block calls; the first one writes the choices to the ranks.
__device__ __forceinline__ uint32_t SendChoices(const EpDispatchArgs& args, int row, uint32_t alive) {
  const EpGroup& group = args.group;
  const int lane = threadIdx.x % 32;
  const uint32_t place = PlaceOfChoice(group, args.experts, row, lane);
  const int64_t token = static_cast<int64_t>(group.rank) * args.rows + row;
  const int64_t choice = token * group.shape.top_k + lane;
  uint32_t targets = 0;
  for (int rank = 0; rank < group.shape.ranks; ++rank) {
    if ((alive >> rank & 1) == 0) continue;
    const uint32_t chosen = __ballot_sync(kFullWarp, place >> 16 == rank);
    if (chosen != 0) targets |= 1u << rank;
    if (threadIdx.x >= 32) continue;
    const EpWindow& window = group.windows[rank];
    if (lane == 0) window.chosen[token] = chosen;
    if ((chosen >> lane & 1) == 0) continue;
    window.experts[choice] = static_cast<int32_t>(place & 0xffff);
    window.weights[choice] = args.weights[static_cast<int64_t>(row) * group.shape.top_k + lane];
  }
  return targets;
}

template <EpPayload kPayload>
__device__ __forceinline__ void SendRow(const EpDispatchArgs& args, int row, uint32_t targets) {
  const EpGroup& group = args.group;
  const int columns = group.shape.hidden / 8;
  const auto* const x = reinterpret_cast<const Bf16x8*>(args.x) + static_cast<int64_t>(row) * columns;
  const int64_t token = static_cast<int64_t>(group.rank) * args.rows + row;
  for (int base = 0; base < columns; base += kThreads) {
    const int i = base + threadIdx.x;
    const bool inside = i < columns;  // quantising needs every lane
    const Bf16x8 value = x[inside ? i : 0];
    if constexpr (kPayload == EpPayload::kBf16) {
      if (!inside) return;
      for (uint32_t left = targets; left != 0; left &= left - 1) {
        reinterpret_cast<Bf16x8*>(group.windows[__ffs(left) - 1].tokens)[token * columns + i] = value;
      }
    } else {
      float wide[8];
      Widen(value, wide);
      float scale;
      const uint2 codes = QuantizeBlock(wide, scale);
      if (!inside) return;
      for (uint32_t left = targets; left != 0; left &= left - 1) {
        const EpWindow& window = group.windows[__ffs(left) - 1];
        reinterpret_cast<uint2*>(window.tokens)[token * columns + i] = codes;
        if (threadIdx.x % 16 == 0) window.scales[token * (columns / 16) + i / 16] = scale;
      }
    }
  }
}

template <EpPayload kPayload>
__global__ void __launch_bounds__(kThreads) Dispatch(const __grid_constant__ EpDispatchArgs args) {
  const uint32_t alive = args.group.control->alive;
  for (int row = blockIdx.x; row < args.rows; row += gridDim.x) {
    SendRow<kPayload>(args, row, SendChoices(args, row, alive));
  }
  Announce(args.group, &args.group.control->dispatch_blocks, true, &EpWindow::dispatched, args.rows);
}

// blockIdx.y: the rank that sent.
__global__ void __launch_bounds__(kThreads) Receive(const __grid_constant__ EpReceiveArgs args) {
  const EpGroup& group = args.group;
  const EpWindow& window = group.windows[group.rank];
  const int source = blockIdx.y;
  bool arrived = false;
  if (threadIdx.x == 0 && (group.control->alive >> source & 1) != 0) {
    arrived = AwaitFlag(group, window.dispatched + source, source, EpPhase::kDispatch, args.rows);
  }
  arrived = __syncthreads_or(arrived);  // what thread 0 acquired, all may read
  const int top_k = group.shape.top_k;
  const int count = args.rows * top_k;
  for (int i = blockIdx.x * kThreads + threadIdx.x; i < count; i += gridDim.x * kThreads) {
    const int row = i / top_k;
    const int64_t choice = static_cast<int64_t>(source) * count + i;
    const uint32_t chosen = arrived ? window.chosen[static_cast<int64_t>(source) * args.rows + row] : 0;
    const bool mine = (chosen >> (i - row * top_k) & 1) != 0;
    args.experts[choice] = mine ? window.experts[choice] : -1;
    args.weights[choice] = mine ? window.weights[choice] : 0;
  }
  if (blockIdx.x == 0 && source == 0 && threadIdx.x == 0) *args.valid_rows = group.shape.ranks * args.rows;
}

__global__ void __launch_bounds__(kThreads) Return(const __grid_constant__ EpReturnArgs args) {
  const EpGroup& group = args.group;
  const int columns = group.shape.hidden / 8;
  const int top_k = group.shape.top_k;
  const uint32_t alive = group.control->alive;
  const auto* const in = reinterpret_cast<const Bf16x8*>(args.expert_out);
  for (int token = blockIdx.x; token < group.shape.ranks * args.rows; token += gridDim.x) {
    const int source = token / args.rows;
    if ((alive >> source & 1) == 0) continue;
    const uint32_t chosen = group.windows[group.rank].chosen[token];
    if (chosen == 0) continue;
    const int64_t row = token - source * args.rows;
    auto* const out = reinterpret_cast<Bf16x8*>(group.windows[source].partial) +
                      (row * group.shape.ranks + group.rank) * columns;
    for (int i = threadIdx.x; i < columns; i += kThreads) {
      float sum[8] = {};
#pragma unroll 8
      for (int j = 0; j < top_k; ++j) {
        if ((chosen >> j & 1) != 0) AddTo(sum, in[(static_cast<int64_t>(token) * top_k + j) * columns + i]);
      }
      out[i] = Narrow(sum);
    }
  }
  Announce(group, &group.control->return_blocks, false, &EpWindow::returned, args.rows);
}

// A block takes every gridDim.x-th row. Dynamic shared memory: the new residual row, [hidden] floats.
__global__ void __launch_bounds__(kThreads) EpCombine(const __grid_constant__ EpCombineArgs args) {
  extern __shared__ float4 row4[];
  __shared__ float scratch[kThreads / 32];
  const EpGroup& group = args.group;
  const EpWindow& window = group.windows[group.rank];
  const uint32_t alive = group.control->alive;
  const int rank = threadIdx.x;
  bool arrived = true;
  if (rank < group.shape.ranks && (alive >> rank & 1) != 0) {
    arrived = AwaitFlag(group, window.returned + rank, rank, EpPhase::kReturn, args.rows);
  }
  if (!__syncthreads_and(arrived)) return;  // the step is void
  const int columns = group.shape.hidden / 8;
  const NormWeights<kThreads> norm(args.norm_weight, group.shape.hidden);
  for (int row = blockIdx.x; row < args.rows; row += gridDim.x) {
    const uint32_t place = PlaceOfChoice(group, args.experts, row, threadIdx.x % 32);
    uint32_t ranks = 0;  // that returned a sum
    for (int r = 0; r < group.shape.ranks; ++r) {
      if (__any_sync(kFullWarp, place >> 16 == r) != 0) ranks |= 1u << r;
    }
    ranks &= alive;
    const auto* const partial = reinterpret_cast<const Bf16x8*>(window.partial) +
                                static_cast<int64_t>(row) * group.shape.ranks * columns;
    const int64_t at = static_cast<int64_t>(row) * group.shape.hidden;
    CombineRow(args.residual + at, norm, args.normed + at, group.shape.hidden, args.eps, row4, scratch,
               [&](int i, float(&sum)[8]) {
#pragma unroll
                 for (int r = 0; r < kEpRanksMax; ++r) {
                   if ((ranks >> r & 1) != 0) AddTo(sum, partial[r * columns + i]);
                 }
                 if (args.local != nullptr) AddTo(sum, reinterpret_cast<const Bf16x8*>(args.local + at)[i]);
               });
  }
}

bool Valid(const EpGroup& group, int32_t rows) {
  const EpShape& s = group.shape;
  return s.ranks >= 1 && s.ranks <= kEpRanksMax && s.top_k >= 1 && s.top_k <= kEpTopKMax && rows >= 1 &&
         rows <= s.rows_max && s.hidden % (s.payload == EpPayload::kE4m3 ? kEpScaleBlock : 8) == 0;
}

}  // namespace

size_t PlaceEpWindow(const EpShape& shape, std::byte* base, EpWindow* window) {
  size_t bytes = 0;
  const auto place = [&](auto*& array, size_t count) {
    using Element = std::remove_reference_t<decltype(*array)>;
    array = base == nullptr ? nullptr : reinterpret_cast<Element*>(base + bytes);
    bytes += (count * sizeof(Element) + 255) / 256 * 256;
  };
  const auto ranks = static_cast<size_t>(shape.ranks);
  const size_t tokens = ranks * static_cast<size_t>(shape.rows_max);
  const auto hidden = static_cast<size_t>(shape.hidden);
  const bool e4m3 = shape.payload == EpPayload::kE4m3;
  place(window->dispatched, ranks);
  place(window->returned, ranks);
  place(window->chosen, tokens);
  place(window->experts, tokens * static_cast<size_t>(shape.top_k));
  place(window->weights, tokens * static_cast<size_t>(shape.top_k));
  place(window->tokens, tokens * hidden * (e4m3 ? 1 : 2));
  place(window->scales, e4m3 ? tokens * hidden / kEpScaleBlock : 0);
  place(window->partial, tokens * hidden);
  return bytes;
}

cudaError_t LaunchEpDispatch(const EpDispatchArgs& args, cudaStream_t stream) {
  if (!Valid(args.group, args.rows)) return cudaErrorInvalidValue;
  const int blocks = args.rows < kBlocksMax ? args.rows : kBlocksMax;
  if (args.group.shape.payload == EpPayload::kBf16) {
    Dispatch<EpPayload::kBf16><<<blocks, kThreads, 0, stream>>>(args);
  } else {
    Dispatch<EpPayload::kE4m3><<<blocks, kThreads, 0, stream>>>(args);
  }
  return cudaGetLastError();
}

cudaError_t LaunchEpReceive(const EpReceiveArgs& args, cudaStream_t stream) {
  if (!Valid(args.group, args.rows)) return cudaErrorInvalidValue;
  const int needed = (args.rows * args.group.shape.top_k + kThreads - 1) / kThreads;
  const dim3 grid(needed < 8 ? needed : 8, args.group.shape.ranks);
  Receive<<<grid, kThreads, 0, stream>>>(args);
  return cudaGetLastError();
}

cudaError_t LaunchEpReturn(const EpReturnArgs& args, cudaStream_t stream) {
  if (!Valid(args.group, args.rows)) return cudaErrorInvalidValue;
  const int tokens = args.group.shape.ranks * args.rows;
  const int blocks = tokens < kBlocksMax ? tokens : kBlocksMax;
  Return<<<blocks, kThreads, 0, stream>>>(args);
  return cudaGetLastError();
}

cudaError_t LaunchEpCombine(const EpCombineArgs& args, cudaStream_t stream) {
  if (!Valid(args.group, args.rows)) return cudaErrorInvalidValue;
  const int blocks = args.rows < args.group.waiting_blocks_max ? args.rows : args.group.waiting_blocks_max;
  EpCombine<<<blocks, kThreads, args.group.shape.hidden * sizeof(float), stream>>>(args);
  return cudaGetLastError();
}

}  // namespace millrace::engine::cuda
