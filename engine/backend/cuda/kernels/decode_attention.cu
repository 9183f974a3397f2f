// Work items are (sequence, split, kv head); a persistent CTA takes items blockIdx.x, + gridDim.x, ... Inside
// an item warp w owns tokens 16 w .. 16 w + 15 of every page, with its own ring of asynchronous copies that
// runs ahead into the next items, so that loads never stop at an item's end. Warps are merged in shared
// memory, splits by the last CTA to finish a (sequence, kv head).

#include "engine/backend/cuda/kernels/decode_attention.h"
#include "engine/backend/cuda/kernels/head_rows.cuh"
#include "engine/backend/cuda/kernels/launch.cuh"
#include "engine/backend/cuda/kernels/ptx.cuh"

namespace millrace::engine::cuda {
namespace {

constexpr int kPageTokens = 64;
constexpr int kWarps = 4;
constexpr int kThreads = 32 * kWarps;
constexpr int kWarpTokens = kPageTokens / kWarps;
constexpr int kStages = 3;
constexpr int kSplitsMax = 32;
constexpr int kGroupMax = 8;  // query heads per kv head
constexpr float kLog2E = 1.4426950408889634f;

// Pages per split of a sequence of `pages` pages: a function of the sequence alone. 4 up to 2k tokens, so
// that a short sequence still spreads; 8 beyond, where ending a split costs more than spreading gains.
__host__ __device__ constexpr int SplitPages(int pages) {
  const int share = (pages + kSplitsMax - 1) / kSplitsMax;
  const int wanted = pages <= 16 ? 4 : 8;
  return share > wanted ? share : wanted;
}
__host__ __device__ constexpr int NumPages(int length) { return (length + kPageTokens - 1) / kPageTokens; }
// A sequence of length 0 has one empty split, which writes its zeros.
__host__ __device__ constexpr int NumSplits(int length) {
  const int pages = NumPages(length);
  return pages == 0 ? 1 : (pages + SplitPages(pages) - 1) / SplitPages(pages);
}

// 16 rows of K or of V.
template <int kHeadDim>
constexpr int kWarpBytes = kWarpTokens* HeadRows<kHeadDim>::kPitch;

template <int kHeadDim>
struct alignas(16) Shared {
  uint8_t kv[kWarps][kStages][2][kWarpBytes<kHeadDim>];
  float sums[3][kGroupMax][kHeadDim];  // outputs of warps 2, 3, 1 on their way into 0, 1, 0
  float maxima[3][kGroupMax];
  float totals[3][kGroupMax];
  int32_t first_item[kDecodeAttentionSeqsMax + 1];  // of each sequence, in units of (split)
  int32_t warp_sums[kWarps];
  int32_t is_last;
};

// The workspace: counters [seqs][kv heads], then partial results.
struct Workspace {
  int32_t* counters;
  float* sums;    // [seq][kv head][split][group][head_dim], not divided by the total
  float* maxima;  // [seq][kv head][split][group], of scaled scores in base 2
  float* totals;  // the same
};

// The same for every num_seqs, so that a launch never takes an earlier one's partial results for counters.
constexpr size_t CounterBytes(int num_kv_heads) {
  return static_cast<size_t>(kDecodeAttentionSeqsMax) * num_kv_heads * sizeof(int32_t);
}

struct Params {
  DecodeAttentionArgs args;
  Workspace workspace;
};

struct Item {
  int seq;
  int split;
  int num_splits;
  int kv_head;
  int begin_page;
  int end_page;
  int length;
};

template <int kHeadDim>
__device__ __forceinline__ Item FindItem(const DecodeAttentionArgs& args, const Shared<kHeadDim>& shared,
                                         int index) {
  const int unit = index / args.num_kv_heads;
  int low = 0;
  int high = args.num_seqs;  // first_item[low] <= unit < first_item[high]
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    if (shared.first_item[middle] <= unit) {
      low = middle;
    } else {
      high = middle;
    }
  }
  Item item;
  item.seq = low;
  item.kv_head = index % args.num_kv_heads;
  item.split = unit - shared.first_item[low];
  item.num_splits = shared.first_item[low + 1] - shared.first_item[low];
  item.length = max(args.lengths[low], 0);
  const int pages = NumPages(item.length);
  item.begin_page = item.split * SplitPages(pages);
  item.end_page = min(item.begin_page + SplitPages(pages), pages);
  return item;
}

// Exclusive prefix sums of the splits of each sequence; the whole CTA.
template <int kHeadDim>
__device__ __forceinline__ void BuildItems(const DecodeAttentionArgs& args, Shared<kHeadDim>& shared) {
  const int per_thread = (args.num_seqs + kThreads - 1) / kThreads;
  const int begin = min(static_cast<int>(threadIdx.x) * per_thread, args.num_seqs);
  const int end = min(begin + per_thread, args.num_seqs);
  int count = 0;
  for (int i = begin; i < end; ++i) count += NumSplits(max(args.lengths[i], 0));
  const int lane = threadIdx.x % 32;
  const int warp = threadIdx.x / 32;
  int sum = count;
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const int below = __shfl_up_sync(0xffffffffu, sum, step);
    if (lane >= step) sum += below;
  }
  if (lane == 31) shared.warp_sums[warp] = sum;
  __syncthreads();  // warp_sums
  for (int i = 0; i < warp; ++i) sum += shared.warp_sums[i];
  int next = sum - count;
  for (int i = begin; i < end; ++i) {
    shared.first_item[i] = next;
    next += NumSplits(max(args.lengths[i], 0));
  }
  if (threadIdx.x == kThreads - 1) shared.first_item[args.num_seqs] = sum;
  __syncthreads();  // first_item
}

// The running softmax of one warp: its 16-row mma tile holds the query heads of the group in rows 0..7.
template <int kHeadDim>
struct Softmax {
  float max = -INFINITY;  // of row lane / 4
  float total = 0;        // of this lane's columns only
  float sums[kHeadDim / 8][4];
};

// The stream of (item, page) that one warp walks; the loader and the multiplier each hold one.
template <int kHeadDim>
struct Walk {
  int index;  // of the item
  Item item;
  int page;  // of the sequence
  __device__ __forceinline__ bool Skip(const DecodeAttentionArgs& args, const Shared<kHeadDim>& shared,
                                       int num_items) {
    // Moves on to the next item that has pages. False: no more work.
    while (index < num_items) {
      item = FindItem(args, shared, index);
      page = item.begin_page;
      if (page < item.end_page) return true;
      index += gridDim.x;
    }
    return false;
  }
};

// Starts the copies of this warp's 16 K and V rows of one page; rows beyond the length become zeros.
template <int kHeadDim>
__device__ __forceinline__ void LoadRows(const DecodeAttentionArgs& args, const Item& item, int page,
                                         int warp, int lane, uint32_t stage) {
  constexpr int kChunks = kHeadDim / 8;
  const int64_t page_id = args.page_table[item.seq * args.page_table_stride + page];
  const int64_t head_elements = kPageTokens * kHeadDim;
  const __nv_bfloat16* k = args.kv + (page_id * 2 * args.num_kv_heads + item.kv_head) * head_elements +
                           warp * kWarpTokens * kHeadDim;
  const __nv_bfloat16* v = k + args.num_kv_heads * head_elements;
  const int rows = item.length - page * kPageTokens - warp * kWarpTokens;
#pragma unroll
  for (int i = lane; i < kWarpTokens * kChunks; i += 32) {
    const int row = i / kChunks;
    const int chunk = i % kChunks;
    const uint32_t offset = HeadRows<kHeadDim>::Offset(row, chunk);
    ptx::CopyAsync16(stage + offset, k + row * kHeadDim + chunk * 8, row < rows);
    ptx::CopyAsync16(stage + kWarpBytes<kHeadDim> + offset, v + row * kHeadDim + chunk * 8, row < rows);
  }
}

// Folds 16 tokens into the running softmax. `valid`: how many of them exist (at least 1).
template <int kHeadDim>
__device__ __forceinline__ void Fold(const uint32_t (&q)[kHeadDim / 16][4], uint32_t stage, int lane,
                                     int valid, float scale_log2, Softmax<kHeadDim>& state) {
  float scores[2][4] = {};
  const int k_row = (lane & 7) + ((lane >> 4) << 3);
  const int k_chunk = (lane >> 3) & 1;
#pragma unroll
  for (int step = 0; step < kHeadDim / 16; ++step) {
    uint32_t b[4];  // tokens 0-7 (dims lo, hi), tokens 8-15 (dims lo, hi)
    ptx::LoadMatrix4(b, stage + HeadRows<kHeadDim>::Offset(k_row, step * 2 + k_chunk));
    ptx::Mma16816(scores[0], q[step], b[0], b[1]);
    ptx::Mma16816(scores[1], q[step], b[2], b[3]);
  }
  const int column = 2 * (lane & 3);
  float p[4];  // tokens column, column + 1, column + 8, column + 9 of head lane / 4
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int token = column + (i & 1) + (i >> 1) * 8;
    p[i] = token < valid ? scores[i >> 1][i & 1] * scale_log2 : -INFINITY;
  }
  float max = fmaxf(fmaxf(p[0], p[1]), fmaxf(p[2], p[3]));
  max = fmaxf(max, __shfl_xor_sync(0xffffffffu, max, 1));
  max = fmaxf(max, __shfl_xor_sync(0xffffffffu, max, 2));
  max = fmaxf(max, state.max);  // finite: at least one token is valid
  if (__any_sync(0xffffffffu, max != state.max)) {
    const float shrink = ptx::Exp2(state.max - max);
    state.total *= shrink;
#pragma unroll
    for (int j = 0; j < kHeadDim / 8; ++j) {
      state.sums[j][0] *= shrink;
      state.sums[j][1] *= shrink;
    }
    state.max = max;
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) p[i] = ptx::Exp2(p[i] - max);
  state.total += (p[0] + p[1]) + (p[2] + p[3]);
  const uint32_t a[4] = {ptx::PackBf16(p[0], p[1]), 0, ptx::PackBf16(p[2], p[3]), 0};
  const uint32_t values = stage + kWarpBytes<kHeadDim>;
  const int v_row = lane & 15;
#pragma unroll
  for (int j = 0; j < kHeadDim / 16; ++j) {
    uint32_t b[4];  // dims 16j..: tokens 0-7, 8-15; dims 16j+8..: the same
    ptx::LoadMatrix4Transposed(b, values + HeadRows<kHeadDim>::Offset(v_row, j * 2 + (lane >> 4)));
    ptx::Mma16816(state.sums[2 * j], a, b[0], b[1]);
    ptx::Mma16816(state.sums[2 * j + 1], a, b[2], b[3]);
  }
}

// Adds what warp `slot` left in shared memory to this warp's state.
template <int kHeadDim>
__device__ __forceinline__ void MergeFrom(const Shared<kHeadDim>& shared, int slot, int head, int column,
                                          int group, Softmax<kHeadDim>& state) {
  if (head >= group) return;
  const float other = shared.maxima[slot][head];
  if (other == -INFINITY) return;
  const float max = fmaxf(state.max, other);
  const float mine = ptx::Exp2(state.max - max);
  const float theirs = ptx::Exp2(other - max);
  state.max = max;
  state.total = state.total * mine + shared.totals[slot][head] * theirs;
#pragma unroll
  for (int j = 0; j < kHeadDim / 8; ++j) {
    const float2 sum = *reinterpret_cast<const float2*>(&shared.sums[slot][head][j * 8 + column]);
    state.sums[j][0] = state.sums[j][0] * mine + sum.x * theirs;
    state.sums[j][1] = state.sums[j][1] * mine + sum.y * theirs;
  }
}

template <int kHeadDim>
__device__ __forceinline__ void LeaveIn(Shared<kHeadDim>& shared, int slot, int head, int column, int group,
                                        const Softmax<kHeadDim>& state) {
  if (head >= group) return;
  if (column == 0) {
    shared.maxima[slot][head] = state.max;
    shared.totals[slot][head] = state.total;
  }
#pragma unroll
  for (int j = 0; j < kHeadDim / 8; ++j) {
    *reinterpret_cast<float2*>(&shared.sums[slot][head][j * 8 + column]) =
        make_float2(state.sums[j][0], state.sums[j][1]);
  }
}

// The last CTA of a (sequence, kv head) adds its splits in ascending order. The whole CTA; a warp per head,
// lane l weighs split l.
template <int kHeadDim>
__device__ __forceinline__ void MergeSplits(const Params& params, const Item& item, int group, int warp,
                                            int lane) {
  const Workspace& w = params.workspace;
  const int64_t unit = static_cast<int64_t>(item.seq) * params.args.num_kv_heads + item.kv_head;
  for (int head = warp; head < group; head += kWarps) {
    const int64_t first = unit * kSplitsMax * group + head;
    const int64_t row = first + static_cast<int64_t>(min(lane, item.num_splits - 1)) * group;
    const float mine = __ldcg(w.maxima + row);
    float total = lane < item.num_splits ? __ldcg(w.totals + row) : 0.0f;
    float max = mine;
#pragma unroll
    for (int step = 1; step < 32; step *= 2) max = fmaxf(max, __shfl_xor_sync(0xffffffffu, max, step));
    const float weight = ptx::Exp2(mine - max);
    total *= weight;
#pragma unroll
    for (int step = 1; step < 32; step *= 2) total += __shfl_xor_sync(0xffffffffu, total, step);
    const int dim = lane * 4 < kHeadDim ? lane * 4 : 0;  // of this lane's four; lanes beyond repeat the first
    float4 sum = make_float4(0, 0, 0, 0);
    const float* parts = w.sums + first * kHeadDim + dim;
#pragma unroll 8
    for (int split = 0; split < item.num_splits; ++split) {
      const float split_weight = __shfl_sync(0xffffffffu, weight, split);
      const float4 part =
          __ldcg(reinterpret_cast<const float4*>(parts + static_cast<int64_t>(split) * group * kHeadDim));
      sum.x = fmaf(split_weight, part.x, sum.x);
      sum.y = fmaf(split_weight, part.y, sum.y);
      sum.z = fmaf(split_weight, part.z, sum.z);
      sum.w = fmaf(split_weight, part.w, sum.w);
    }
    if (lane * 4 >= kHeadDim) continue;
    const float inverse = 1.0f / total;
    auto* out =
        reinterpret_cast<uint32_t*>(params.args.out + item.seq * params.args.out_stride +
                                    static_cast<int64_t>(item.kv_head * group + head) * kHeadDim + dim);
    out[0] = ptx::PackBf16(sum.x * inverse, sum.y * inverse);
    out[1] = ptx::PackBf16(sum.z * inverse, sum.w * inverse);
  }
}

// Ends an item: merges the warps, then writes the output or the split's partial result.
template <int kHeadDim>
__device__ __forceinline__ void Finish(const Params& params, Shared<kHeadDim>& shared, const Item& item,
                                       int warp, int lane, int group, Softmax<kHeadDim>& state) {
  const int head = lane / 4;
  const int column = 2 * (lane & 3);
  state.total += __shfl_xor_sync(0xffffffffu, state.total, 1);
  state.total += __shfl_xor_sync(0xffffffffu, state.total, 2);
  if (warp >= 2) LeaveIn(shared, warp - 2, head, column, group, state);
  __syncthreads();  // warps 2 and 3 have left their results
  if (warp < 2) MergeFrom(shared, warp, head, column, group, state);
  if (warp == 1) LeaveIn(shared, 2, head, column, group, state);
  __syncthreads();  // warp 1 has left its result; slots 0 and 1 have been read and may be written again
  const int64_t unit = static_cast<int64_t>(item.seq) * params.args.num_kv_heads + item.kv_head;
  if (warp == 0) {
    MergeFrom(shared, 2, head, column, group, state);
    if (item.num_splits == 1) {
      if (head < group) {
        const float inverse = state.total > 0 ? 1.0f / state.total : 0.0f;  // 0: an empty sequence
        __nv_bfloat16* out = params.args.out + item.seq * params.args.out_stride +
                             static_cast<int64_t>(item.kv_head * group + head) * kHeadDim + column;
#pragma unroll
        for (int j = 0; j < kHeadDim / 8; ++j) {
          *reinterpret_cast<uint32_t*>(out + j * 8) =
              ptx::PackBf16(state.sums[j][0] * inverse, state.sums[j][1] * inverse);
        }
      }
    } else {
      const Workspace& w = params.workspace;
      if (head < group) {
        const int64_t row = (unit * kSplitsMax + item.split) * group + head;
        if (column == 0) {
          w.maxima[row] = state.max;
          w.totals[row] = state.total;
        }
#pragma unroll
        for (int j = 0; j < kHeadDim / 8; ++j) {
          *reinterpret_cast<float2*>(w.sums + row * kHeadDim + j * 8 + column) =
              make_float2(state.sums[j][0], state.sums[j][1]);
        }
      }
      __threadfence();  // the partial result is visible before the count says so
      __syncwarp();
      if (lane == 0) {
        int32_t* counter = w.counters + unit;
        const bool last = atomicAdd(counter, 1) == item.num_splits - 1;
        if (last) *counter = 0;  // ready for the next launch
        __threadfence();         // the others' partial results are read after the count
        shared.is_last = last;
      }
    }
  }
  if (item.num_splits > 1) {
    __syncthreads();  // is_last
    if (shared.is_last) MergeSplits<kHeadDim>(params, item, group, warp, lane);
  }
}

template <int kHeadDim>
__device__ __forceinline__ void StartItem(const DecodeAttentionArgs& args, const Item& item, int lane,
                                          int group, uint32_t (&q)[kHeadDim / 16][4],
                                          Softmax<kHeadDim>& state) {
  const int head = lane / 4;
  const uint32_t* row = reinterpret_cast<const uint32_t*>(
      args.q + item.seq * args.q_stride + static_cast<int64_t>(item.kv_head * group + head) * kHeadDim);
#pragma unroll
  for (int step = 0; step < kHeadDim / 16; ++step) {
    q[step][0] = head < group ? row[step * 8 + (lane & 3)] : 0;
    q[step][2] = head < group ? row[step * 8 + (lane & 3) + 4] : 0;
    q[step][1] = q[step][3] = 0;
  }
  state.max = -INFINITY;
  state.total = 0;
#pragma unroll
  for (int j = 0; j < kHeadDim / 8; ++j) {
#pragma unroll
    for (int i = 0; i < 4; ++i) state.sums[j][i] = 0;
  }
}

template <int kHeadDim>
__global__ void __launch_bounds__(kThreads, 2) DecodeAttention(const Params params) {
  extern __shared__ uint8_t raw[];
  auto& shared = *reinterpret_cast<Shared<kHeadDim>*>(raw);
  const DecodeAttentionArgs& args = params.args;
  const int warp = threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  const int group = args.num_q_heads / args.num_kv_heads;
  const float scale_log2 = args.scale * kLog2E;
  ptx::LetNextLaunchBegin();
  BuildItems(args, shared);
  const int num_items = shared.first_item[args.num_seqs] * args.num_kv_heads;
  if (static_cast<int>(blockIdx.x) >= num_items) return;  // there are items: other CTAs wait below

  Walk<kHeadDim> ahead;
  ahead.index = blockIdx.x;
  bool more = ahead.Skip(args, shared, num_items);
  int load_stage = 0;
  auto load = [&] {  // one committed group per call, empty when nothing is left
    if (more) {
      LoadRows<kHeadDim>(args, ahead.item, ahead.page, warp, lane,
                         ptx::SmemAddress(shared.kv[warp][load_stage][0]));
      load_stage = load_stage == kStages - 1 ? 0 : load_stage + 1;
      if (++ahead.page == ahead.item.end_page) {
        ahead.index += gridDim.x;
        more = ahead.Skip(args, shared, num_items);
      }
    }
    ptx::CopyAsyncCommit();
  };
  bool waited = false;
#pragma unroll
  for (int i = 0; i < kStages - 1; ++i) {
    // The launch before this one writes a sequence's last page; the pages before it are older than the step.
    if (!waited && more && ahead.page == NumPages(ahead.item.length) - 1) {
      ptx::WaitForEarlierLaunches();
      waited = true;
    }
    load();
  }
  if (!waited) ptx::WaitForEarlierLaunches();

  int stage = 0;
  uint32_t q[kHeadDim / 16][4];
  Softmax<kHeadDim> state;
  for (int index = blockIdx.x; index < num_items; index += gridDim.x) {
    const Item item = FindItem(args, shared, index);
    StartItem(args, item, lane, group, q, state);
    for (int page = item.begin_page; page < item.end_page; ++page) {
      ptx::CopyAsyncWait<kStages - 2>();
      __syncwarp();  // all lanes' copies of this stage have landed; the stage before it has been read by all
      load();
      const int valid = item.length - page * kPageTokens - warp * kWarpTokens;
      if (valid > 0) {
        Fold(q, ptx::SmemAddress(shared.kv[warp][stage][0]), lane, valid, scale_log2, state);
      }
      stage = stage == kStages - 1 ? 0 : stage + 1;
    }
    Finish(params, shared, item, warp, lane, group, state);
  }
}

template <int kHeadDim>
cudaError_t Launch(const Params& params, cudaStream_t stream) {
  constexpr int kBytes = sizeof(Shared<kHeadDim>);
  auto kernel = DecodeAttention<kHeadDim>;
  cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
  if (error != cudaSuccess) return error;
  int device = 0;
  int num_sms = 0;
  int per_sm = 0;
  error = cudaGetDevice(&device);
  if (error != cudaSuccess) return error;
  error = cudaDeviceGetAttribute(&num_sms, cudaDevAttrMultiProcessorCount, device);
  if (error != cudaSuccess) return error;
  error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&per_sm, kernel, kThreads, kBytes);
  if (error != cudaSuccess) return error;
  return LaunchOverlapped(kernel, num_sms * per_sm, kThreads, kBytes, stream, params);
}

}  // namespace

size_t DecodeAttentionWorkspaceBytes(int num_seqs_max, int num_q_heads, int num_kv_heads, int head_dim) {
  const size_t rows = static_cast<size_t>(num_seqs_max) * kSplitsMax * num_q_heads;
  return CounterBytes(num_kv_heads) + rows * (head_dim + 2) * sizeof(float);
}

cudaError_t LaunchDecodeAttention(const DecodeAttentionArgs& args, cudaStream_t stream) {
  if (args.num_seqs > kDecodeAttentionSeqsMax || args.num_kv_heads <= 0 ||
      args.num_q_heads % args.num_kv_heads != 0 || args.num_q_heads / args.num_kv_heads > kGroupMax) {
    return cudaErrorInvalidValue;
  }
  if (args.num_seqs == 0) return cudaSuccess;
  Params params = {args, {}};
  const size_t rows = static_cast<size_t>(args.num_seqs) * kSplitsMax * args.num_q_heads;
  params.workspace.counters = static_cast<int32_t*>(args.workspace);
  params.workspace.sums =
      reinterpret_cast<float*>(static_cast<uint8_t*>(args.workspace) + CounterBytes(args.num_kv_heads));
  params.workspace.maxima = params.workspace.sums + rows * args.head_dim;
  params.workspace.totals = params.workspace.maxima + rows;
  switch (args.head_dim) {
    case 128:
      return Launch<128>(params, stream);
    case 96:
      return Launch<96>(params, stream);
    case 64:
      return Launch<64>(params, stream);
    case 32:
      return Launch<32>(params, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace millrace::engine::cuda
