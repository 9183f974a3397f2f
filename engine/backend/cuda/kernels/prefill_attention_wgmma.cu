// Head dim 128 on wgmma. A CTA takes 128 queries of one head: a producer warp brings Q once and then K and V
// in tiles of 128 tokens (two pages, by tensor copies, two stages each); two consumer warpgroups own 64
// queries each. While the tensor cores multiply tile j's probabilities by V and the queries by tile j + 1's
// keys, the softmax of j + 1 waits only for the latter (the overlap of FlashAttention-3 inside a warpgroup;
// the two warpgroups overlap by themselves).

#include "engine/backend/cuda/kernels/prefill_attention.h"
#include "engine/backend/cuda/kernels/ptx.cuh"
#include "engine/backend/cuda/kernels/query_tiles.cuh"
#include "engine/backend/cuda/kernels/tensor_map.h"
#include "engine/backend/cuda/kernels/wgmma.cuh"

namespace millrace::engine::cuda {
namespace {

constexpr int kHeadDim = 128;
constexpr int kPageTokens = 64;
constexpr int kTileQueries = 128;
constexpr int kTileTokens = 128;
constexpr int kStages = 2;
constexpr int kConsumers = 2;  // warpgroups
constexpr int kThreads = 128 * (1 + kConsumers);
constexpr int kHalfBytes = 128 * 128;  // 128 rows of 64 dims
constexpr int kPageHalfBytes = kPageTokens * 128;
constexpr float kLog2E = 1.4426950408889634f;

// [half of the head dim][row][64 dims], swizzled; 1024-byte alignment.
struct alignas(1024) Shared {
  uint8_t q[2][kHalfBytes];
  uint8_t k[kStages][2][kHalfBytes];
  uint8_t v[kStages][2][kHalfBytes];
  uint64_t q_full;
  uint64_t k_full[kStages];
  uint64_t k_empty[kStages];
  uint64_t v_full[kStages];
  uint64_t v_empty[kStages];
  uint64_t v_tail;  // bytes of a V tile whose missing rows the producer still has to zero
};

struct Stage {
  int index = 0;
  uint32_t phase = 0;
  __device__ __forceinline__ void Advance() {
    if (++index == kStages) {
      index = 0;
      phase ^= 1;
    }
  }
};

// Copies the pages of tile `j` of K (which = 0) or V (1) that exist. One thread.
__device__ __forceinline__ void CopyTile(const PrefillAttentionArgs& args, const CUtensorMap* map,
                                         const QueryTile& tile, int j, int which, int kv_head,
                                         uint32_t shared, uint32_t barrier, uint64_t policy) {
  const int num_pages = (tile.kv_length + kPageTokens - 1) / kPageTokens;
  const int32_t* table = args.page_table + tile.segment * args.page_table_stride;
  const int pages = min(num_pages - 2 * j, 2);
  ptx::BarrierArriveExpect(barrier, pages * 2 * kPageHalfBytes);
  for (int i = 0; i < pages; ++i) {
    const int page = __ldg(table + 2 * j + i);
    for (int half = 0; half < 2; ++half) {
      ptx::TensorCopy5d(shared + half * kHalfBytes + i * kPageHalfBytes, map, half * 64, 0, kv_head, which,
                        page, barrier, policy);
    }
  }
}

// The producer warp. V rows beyond the context are zeroed: their probabilities are 0, but 0 x NaN is not.
__device__ __forceinline__ void Produce(const PrefillAttentionArgs& args, const CUtensorMap* q_map,
                                        const CUtensorMap* kv_map, const QueryTile& tile, int head,
                                        int num_tiles, Shared& shared, int lane) {
  const uint64_t policy = ptx::PolicyEvictNormal();
  const int kv_head = head / (args.num_q_heads / args.num_kv_heads);
  if (lane == 0) {
    const uint32_t barrier = ptx::SmemAddress(&shared.q_full);
    ptx::BarrierArriveExpect(barrier, 2 * kHalfBytes);
    for (int half = 0; half < 2; ++half) {
      ptx::TensorCopy5d(ptx::SmemAddress(shared.q[half]), q_map, half * 64, head, tile.first_query, 0, 0,
                        barrier, policy);
    }
  }
  Stage stage;
  for (int j = 0; j < num_tiles; ++j) {
    const uint32_t v = ptx::SmemAddress(shared.v[stage.index][0]);
    const uint32_t v_full = ptx::SmemAddress(&shared.v_full[stage.index]);
    ptx::BarrierWait(ptx::SmemAddress(&shared.k_empty[stage.index]), stage.phase ^ 1);
    if (lane == 0) {
      CopyTile(args, kv_map, tile, j, 0, kv_head, ptx::SmemAddress(shared.k[stage.index][0]),
               ptx::SmemAddress(&shared.k_full[stage.index]), policy);
    }
    ptx::BarrierWait(ptx::SmemAddress(&shared.v_empty[stage.index]), stage.phase ^ 1);
    const int valid = tile.kv_length - j * kTileTokens;
    if (valid >= kTileTokens) {
      if (lane == 0) CopyTile(args, kv_map, tile, j, 1, kv_head, v, v_full, policy);
    } else {  // the last tile of the context: at most once
      const uint32_t tail = ptx::SmemAddress(&shared.v_tail);
      if (lane == 0) CopyTile(args, kv_map, tile, j, 1, kv_head, v, tail, policy);
      ptx::BarrierWait(tail, 0);
      for (int i = valid * 8 + lane; i < kTileTokens * 8; i += 32) {
        for (int half = 0; half < 2; ++half) {
          *reinterpret_cast<uint4*>(&shared.v[stage.index][half][i * 16]) = make_uint4(0, 0, 0, 0);
        }
      }
      ptx::FenceAsyncProxy();  // wgmma reads these zeros
      __syncwarp();            // all lanes' zeros are written
      if (lane == 0) ptx::BarrierArrive(v_full);
    }
    stage.Advance();
  }
}

// The running softmax of a thread's two rows (lane / 4 and + 8 of its warp's 16).
struct Softmax {
  float max[2] = {-INFINITY, -INFINITY};
  float total[2] = {0, 0};  // of this thread's columns

  // Turns raw scores into probabilities; shrink = the factor for what was summed before.
  __device__ __forceinline__ void Fold(float (&p)[kTileTokens / 2], float scale_log2, float (&shrink)[2]) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float next = max[half];
#pragma unroll
      for (int j = 0; j < kTileTokens / 8; ++j)
        next = fmaxf(next, fmaxf(p[4 * j + 2 * half], p[4 * j + 2 * half + 1]));
      next = fmaxf(next, __shfl_xor_sync(0xffffffffu, next, 1));
      next = fmaxf(next, __shfl_xor_sync(0xffffffffu, next, 2));
      shrink[half] = ptx::Exp2((max[half] - next) * scale_log2);
      max[half] = next;
      const float offset = next * scale_log2;
      float sum = 0;
#pragma unroll
      for (int j = 0; j < kTileTokens / 8; ++j) {
#pragma unroll
        for (int i = 4 * j + 2 * half; i < 4 * j + 2 * half + 2; ++i) {
          p[i] = ptx::Exp2(fmaf(p[i], scale_log2, -offset));
          sum += p[i];
        }
      }
      total[half] = total[half] * shrink[half] + sum;
    }
  }
};

// s = q k^T: 64 queries of this warpgroup by 128 tokens.
__device__ __forceinline__ void IssueScores(uint64_t q, uint64_t k, float (&s)[kTileTokens / 2]) {
#pragma unroll
  for (int step = 0; step < kHeadDim / 16; ++step) {
    const int offset = (step / 4) * (kHalfBytes / 16) + (step % 4) * 2;  // in 16-byte units
    ptx::Wgmma<kTileTokens>::Bf16(s, q + offset, k + offset, step > 0);
  }
}

// o += p v.
__device__ __forceinline__ void IssueValues(const uint32_t (&p)[kTileTokens / 16][4], uint64_t v,
                                            float (&o)[kHeadDim / 2]) {
#pragma unroll
  for (int step = 0; step < kTileTokens / 16; ++step) {
    ptx::Wgmma<kHeadDim>::Bf16RegistersByMnMajor(o, p[step], v + step * (2048 / 16));
  }
}

__device__ __forceinline__ void PackProbabilities(const float (&s)[kTileTokens / 2],
                                                  uint32_t (&p)[kTileTokens / 16][4]) {
#pragma unroll
  for (int step = 0; step < kTileTokens / 16; ++step) {
#pragma unroll
    for (int i = 0; i < 4; ++i) p[step][i] = ptx::PackBf16(s[step * 8 + 2 * i], s[step * 8 + 2 * i + 1]);
  }
}

// One consumer warpgroup: 64 queries against all tiles.
__device__ __forceinline__ void Consume(const PrefillAttentionArgs& args, const QueryTile& tile, int head,
                                        int num_tiles, Shared& shared, int group, int thread) {
  const int warp = thread / 32;
  const int lane = thread % 32;
  const float scale_log2 = args.scale * kLog2E;
  const int query0 = group * 64 + warp * 16 + lane / 4;
  const int position0 = tile.first_position + query0;
  const int column = 2 * (lane & 3);
  auto mask = [&](float(&s)[kTileTokens / 2], int j) {
    if (j * kTileTokens + kTileTokens - 1 <= tile.first_position + group * 64) return;
#pragma unroll
    for (int i = 0; i < kTileTokens / 2; ++i) {
      const int token = j * kTileTokens + (i / 4) * 8 + column + (i & 1);
      if (token > position0 + (i & 2) * 4) s[i] = -INFINITY;
    }
  };
  auto arrive = [&](uint64_t& barrier) {
    if (lane == 0) ptx::BarrierArrive(ptx::SmemAddress(&barrier));
  };
  const uint64_t q = ptx::WgmmaDescriptor(ptx::SmemAddress(shared.q[0]) + group * 64 * 128, 16, 1024);
  auto keys = [&](int s) { return ptx::WgmmaDescriptor(ptx::SmemAddress(shared.k[s][0]), 16, 1024); };
  auto values = [&](int s) {
    return ptx::WgmmaDescriptor(ptx::SmemAddress(shared.v[s][0]), kHalfBytes, 1024);
  };

  Softmax softmax;
  float o[kHeadDim / 2] = {};
  uint32_t p[kTileTokens / 16][4];
  float shrink[2];
  Stage k_stage;
  Stage v_stage;
  ptx::BarrierWait(ptx::SmemAddress(&shared.q_full), 0);
  {
    float s[kTileTokens / 2] = {};
    ptx::BarrierWait(ptx::SmemAddress(&shared.k_full[0]), 0);
    ptx::WgmmaFence();
    IssueScores(q, keys(0), s);
    ptx::WgmmaCommit();
    ptx::WgmmaWait<0>();
    ptx::FenceOperands(s);
    arrive(shared.k_empty[0]);
    k_stage.Advance();
    mask(s, 0);
    softmax.Fold(s, scale_log2, shrink);
    PackProbabilities(s, p);
  }
  for (int j = 1; j < num_tiles; ++j) {
    float s[kTileTokens / 2] = {};
    ptx::BarrierWait(ptx::SmemAddress(&shared.k_full[k_stage.index]), k_stage.phase);
    ptx::FenceOperands(s);
    ptx::WgmmaFence();
    IssueScores(q, keys(k_stage.index), s);
    ptx::WgmmaCommit();
    ptx::BarrierWait(ptx::SmemAddress(&shared.v_full[v_stage.index]), v_stage.phase);
    ptx::FenceOperands(o);
    ptx::WgmmaFence();
    IssueValues(p, values(v_stage.index), o);
    ptx::WgmmaCommit();
    ptx::WgmmaWait<1>();  // the scores
    ptx::FenceOperands(s);
    arrive(shared.k_empty[k_stage.index]);
    k_stage.Advance();
    mask(s, j);
    softmax.Fold(s, scale_log2, shrink);
    ptx::WgmmaWait<0>();  // the values
    ptx::FenceOperands(o);
    arrive(shared.v_empty[v_stage.index]);
    v_stage.Advance();
    PackProbabilities(s, p);
#pragma unroll
    for (int i = 0; i < kHeadDim / 2; ++i) o[i] *= shrink[(i / 2) & 1];
  }
  ptx::BarrierWait(ptx::SmemAddress(&shared.v_full[v_stage.index]), v_stage.phase);
  ptx::FenceOperands(o);
  ptx::WgmmaFence();
  IssueValues(p, values(v_stage.index), o);
  ptx::WgmmaCommit();
  ptx::WgmmaWait<0>();
  ptx::FenceOperands(o);

#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float total = softmax.total[half];
    total += __shfl_xor_sync(0xffffffffu, total, 1);
    total += __shfl_xor_sync(0xffffffffu, total, 2);
    const int query = query0 + half * 8;
    if (query >= tile.num_queries) continue;
    const float inverse = 1.0f / total;
    __nv_bfloat16* out = args.out + (tile.first_query + query) * args.out_stride +
                         static_cast<int64_t>(head) * kHeadDim + column;
#pragma unroll
    for (int j = 0; j < kHeadDim / 8; ++j) {
      *reinterpret_cast<uint32_t*>(out + j * 8) =
          ptx::PackBf16(o[4 * j + 2 * half] * inverse, o[4 * j + 2 * half + 1] * inverse);
    }
  }
}

__global__ void __launch_bounds__(kThreads, 1)
    PrefillAttentionWgmma(const PrefillAttentionArgs args, const __grid_constant__ CUtensorMap q_map,
                          const __grid_constant__ CUtensorMap kv_map) {
  extern __shared__ uint8_t raw[];
  auto& shared = *reinterpret_cast<Shared*>(raw + ((1024 - (ptx::SmemAddress(raw) & 1023)) & 1023));
  const int lane = threadIdx.x % 32;
  // Later tiles of a segment are longer: they start first.
  const QueryTile tile = FindQueryTile<kTileQueries>(args.q_begin, args.kv_lengths, args.num_segments,
                                                     gridDim.y - 1 - blockIdx.y, lane);
  if (tile.segment < 0) return;
  const int head = blockIdx.x;
  const int num_tiles = (tile.first_position + tile.num_queries + kTileTokens - 1) / kTileTokens;
  if (threadIdx.x == 0) {
    ptx::TensorMapPrefetch(&q_map);
    ptx::TensorMapPrefetch(&kv_map);
    ptx::BarrierInit(ptx::SmemAddress(&shared.q_full), 1);
    ptx::BarrierInit(ptx::SmemAddress(&shared.v_tail), 1);
    for (int i = 0; i < kStages; ++i) {
      ptx::BarrierInit(ptx::SmemAddress(&shared.k_full[i]), 1);
      ptx::BarrierInit(ptx::SmemAddress(&shared.v_full[i]), 1);
      ptx::BarrierInit(ptx::SmemAddress(&shared.k_empty[i]), 4 * kConsumers);
      ptx::BarrierInit(ptx::SmemAddress(&shared.v_empty[i]), 4 * kConsumers);
    }
    ptx::BarrierInitFence();
  }
  __syncthreads();  // barriers are ready
  const int warpgroup = threadIdx.x / 128;
  if (warpgroup == 0) {
    ptx::RegistersDecrease<24>();
    if (threadIdx.x < 32) Produce(args, &q_map, &kv_map, tile, head, num_tiles, shared, lane);
  } else {
    ptx::RegistersIncrease<240>();
    Consume(args, tile, head, num_tiles, shared, warpgroup - 1, threadIdx.x % 128);
  }
}

}  // namespace

cudaError_t LaunchPrefillAttentionWgmma(const PrefillAttentionArgs& args, cudaStream_t stream) {
  if (args.head_dim != kHeadDim) return cudaErrorInvalidValue;
  if (args.num_segments == 0 || args.num_tokens == 0) return cudaSuccess;
  constexpr uint64_t kRow = kHeadDim * 2;
  const uint64_t q_pitch = static_cast<uint64_t>(args.q_stride) * 2;
  const TensorMapSpec q_spec = {.base = args.q,
                                .sizes = {kHeadDim, static_cast<uint64_t>(args.num_q_heads),
                                          static_cast<uint64_t>(args.num_tokens), 1, 1},
                                .strides_bytes = {kRow, q_pitch, q_pitch, q_pitch},
                                .box = {64, 1, kTileQueries, 1, 1}};
  const uint64_t heads = args.num_kv_heads;
  const TensorMapSpec kv_spec = {
      .base = args.kv,
      .sizes = {kHeadDim, kPageTokens, heads, 2, static_cast<uint64_t>(args.num_pages)},
      .strides_bytes = {kRow, kPageTokens * kRow, heads * kPageTokens * kRow, 2 * heads * kPageTokens * kRow},
      .box = {64, kPageTokens, 1, 1, 1}};
  CUtensorMap q_map;
  CUtensorMap kv_map;
  cudaError_t error = EncodeTensorMap(q_spec, &q_map);
  if (error != cudaSuccess) return error;
  error = EncodeTensorMap(kv_spec, &kv_map);
  if (error != cudaSuccess) return error;
  constexpr int kBytes = sizeof(Shared) + 1024;
  error = cudaFuncSetAttribute(PrefillAttentionWgmma, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
  if (error != cudaSuccess) return error;
  const dim3 grid(args.num_q_heads, args.num_tokens / kTileQueries + args.num_segments);
  PrefillAttentionWgmma<<<grid, kThreads, kBytes, stream>>>(args, q_map, kv_map);
  return cudaGetLastError();
}

}  // namespace millrace::engine::cuda
