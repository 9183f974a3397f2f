// A CTA of 4 warps takes 64 queries of one head, 16 per warp, and folds the keys page by page (64 tokens, two
// pages in flight) with the running softmax of FlashAttention-2, on mma.sync.

#include "engine/backend/cuda/kernels/head_rows.cuh"
#include "engine/backend/cuda/kernels/prefill_attention.h"
#include "engine/backend/cuda/kernels/ptx.cuh"
#include "engine/backend/cuda/kernels/query_tiles.cuh"

namespace millrace::engine::cuda {
namespace {

constexpr int kPageTokens = 64;
constexpr int kTileQueries = 64;
constexpr int kThreads = 128;
constexpr float kLog2E = 1.4426950408889634f;

template <int kHeadDim>
struct alignas(16) Shared {
  static constexpr int kTileBytes = kPageTokens * HeadRows<kHeadDim>::kPitch;
  uint8_t q[kTileBytes];
  uint8_t kv[2][2][kTileBytes];  // [stage][k|v]
};

// Starts copies of 64 rows `pitch` elements apart; rows from `valid` on become zeros.
template <int kHeadDim>
__device__ __forceinline__ void LoadTile(uint32_t shared, const __nv_bfloat16* rows, int64_t pitch,
                                         int valid) {
  constexpr int kChunks = kHeadDim / 8;
#pragma unroll
  for (int i = threadIdx.x; i < 64 * kChunks; i += kThreads) {
    const int row = i / kChunks;
    const int chunk = i % kChunks;
    const bool inside = row < valid;
    ptx::CopyAsync16(shared + HeadRows<kHeadDim>::Offset(row, chunk),
                     inside ? rows + row * pitch + chunk * 8 : rows, inside);
  }
}

// Scores of this warp's 16 queries against 64 keys.
template <int kHeadDim>
__device__ __forceinline__ void Scores(const uint32_t (&q)[kHeadDim / 16][4], uint32_t keys, int lane,
                                       float (&scores)[8][4]) {
  const int row = (lane & 7) + ((lane >> 4) << 3);
  const int chunk = (lane >> 3) & 1;
#pragma unroll
  for (int step = 0; step < kHeadDim / 16; ++step) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      uint32_t b[4];
      ptx::LoadMatrix4(b, keys + HeadRows<kHeadDim>::Offset(j * 16 + row, step * 2 + chunk));
      ptx::Mma16816(scores[2 * j], q[step], b[0], b[1]);
      ptx::Mma16816(scores[2 * j + 1], q[step], b[2], b[3]);
    }
  }
}

template <int kHeadDim>
__global__ void __launch_bounds__(kThreads, 2) PrefillAttentionMma(const PrefillAttentionArgs args) {
  extern __shared__ uint8_t raw[];
  auto& shared = *reinterpret_cast<Shared<kHeadDim>*>(raw);
  const int warp = threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  const int head = blockIdx.x;
  // Later tiles of a segment are longer: they start first.
  const QueryTile tile = FindQueryTile<kTileQueries>(args.q_begin, args.kv_lengths, args.num_segments,
                                                     gridDim.y - 1 - blockIdx.y, lane);
  if (tile.segment < 0) return;
  const int kv_head = head / (args.num_q_heads / args.num_kv_heads);
  const int num_pages = (tile.first_position + tile.num_queries + kPageTokens - 1) / kPageTokens;
  const int64_t head_elements = kPageTokens * kHeadDim;
  auto load_page = [&](int page) {
    const int64_t id = __ldg(args.page_table + tile.segment * args.page_table_stride + page);
    const __nv_bfloat16* k = args.kv + (id * 2 * args.num_kv_heads + kv_head) * head_elements;
    const int valid = tile.kv_length - page * kPageTokens;
    LoadTile<kHeadDim>(ptx::SmemAddress(shared.kv[page & 1][0]), k, kHeadDim, valid);
    LoadTile<kHeadDim>(ptx::SmemAddress(shared.kv[page & 1][1]), k + args.num_kv_heads * head_elements,
                       kHeadDim, valid);
  };
  LoadTile<kHeadDim>(ptx::SmemAddress(shared.q), args.q + tile.first_query * args.q_stride + head * kHeadDim,
                     args.q_stride, tile.num_queries);
  load_page(0);
  ptx::CopyAsyncCommit();

  const float scale_log2 = args.scale * kLog2E;
  const int column = 2 * (lane & 3);
  const int position0 =
      tile.first_position + warp * 16 + lane / 4;  // of this thread's first row; the other is + 8
  uint32_t q[kHeadDim / 16][4];
  float sums[kHeadDim / 8][4] = {};
  float max[2] = {-INFINITY, -INFINITY};
  float total[2] = {0, 0};  // of this thread's columns
  for (int page = 0; page < num_pages; ++page) {
    ptx::CopyAsyncWait<0>();
    __syncthreads();  // this page is there for all; the page before it has been read by all
    if (page + 1 < num_pages) load_page(page + 1);
    ptx::CopyAsyncCommit();
    if (page == 0) {
#pragma unroll
      for (int step = 0; step < kHeadDim / 16; ++step) {
        ptx::LoadMatrix4(q[step],
                         ptx::SmemAddress(shared.q) +
                             HeadRows<kHeadDim>::Offset(warp * 16 + (lane & 15), step * 2 + (lane >> 4)));
      }
    }
    float p[8][4] = {};
    Scores<kHeadDim>(q, ptx::SmemAddress(shared.kv[page & 1][0]), lane, p);
    if (page * kPageTokens + kPageTokens - 1 > tile.first_position + warp * 16) {
#pragma unroll
      for (int j = 0; j < 8; ++j) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int token = page * kPageTokens + j * 8 + column + (i & 1);
          if (token > position0 + (i >> 1) * 8) p[j][i] = -INFINITY;
        }
      }
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float next = max[half];
#pragma unroll
      for (int j = 0; j < 8; ++j) next = fmaxf(next, fmaxf(p[j][2 * half], p[j][2 * half + 1]));
      next = fmaxf(next, __shfl_xor_sync(0xffffffffu, next, 1));
      next = fmaxf(next, __shfl_xor_sync(0xffffffffu, next, 2));
      const float shrink = ptx::Exp2((max[half] - next) * scale_log2);
      max[half] = next;
      const float offset = next * scale_log2;
      float sum = 0;
#pragma unroll
      for (int j = 0; j < 8; ++j) {
#pragma unroll
        for (int i = 2 * half; i < 2 * half + 2; ++i) {
          p[j][i] = ptx::Exp2(fmaf(p[j][i], scale_log2, -offset));
          sum += p[j][i];
        }
      }
      total[half] = total[half] * shrink + sum;
#pragma unroll
      for (int j = 0; j < kHeadDim / 8; ++j) {
        sums[j][2 * half] *= shrink;
        sums[j][2 * half + 1] *= shrink;
      }
    }
    const uint32_t values = ptx::SmemAddress(shared.kv[page & 1][1]);
#pragma unroll
    for (int step = 0; step < 4; ++step) {
      const uint32_t a[4] = {ptx::PackBf16(p[2 * step][0], p[2 * step][1]),
                             ptx::PackBf16(p[2 * step][2], p[2 * step][3]),
                             ptx::PackBf16(p[2 * step + 1][0], p[2 * step + 1][1]),
                             ptx::PackBf16(p[2 * step + 1][2], p[2 * step + 1][3])};
#pragma unroll
      for (int j = 0; j < kHeadDim / 16; ++j) {
        uint32_t b[4];
        ptx::LoadMatrix4Transposed(
            b, values + HeadRows<kHeadDim>::Offset(step * 16 + (lane & 15), j * 2 + (lane >> 4)));
        ptx::Mma16816(sums[2 * j], a, b[0], b[1]);
        ptx::Mma16816(sums[2 * j + 1], a, b[2], b[3]);
      }
    }
  }
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    total[half] += __shfl_xor_sync(0xffffffffu, total[half], 1);
    total[half] += __shfl_xor_sync(0xffffffffu, total[half], 2);
    const int query = warp * 16 + lane / 4 + half * 8;
    if (query >= tile.num_queries) continue;
    const float inverse = 1.0f / total[half];
    __nv_bfloat16* out = args.out + (tile.first_query + query) * args.out_stride +
                         static_cast<int64_t>(head) * kHeadDim + column;
#pragma unroll
    for (int j = 0; j < kHeadDim / 8; ++j) {
      *reinterpret_cast<uint32_t*>(out + j * 8) =
          ptx::PackBf16(sums[j][2 * half] * inverse, sums[j][2 * half + 1] * inverse);
    }
  }
}

template <int kHeadDim>
cudaError_t Launch(const PrefillAttentionArgs& args, cudaStream_t stream) {
  constexpr int kBytes = sizeof(Shared<kHeadDim>);
  auto kernel = PrefillAttentionMma<kHeadDim>;
  const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
  if (error != cudaSuccess) return error;
  const dim3 grid(args.num_q_heads, args.num_tokens / kTileQueries + args.num_segments);
  kernel<<<grid, kThreads, kBytes, stream>>>(args);
  return cudaGetLastError();
}

}  // namespace

cudaError_t LaunchPrefillAttentionMma(const PrefillAttentionArgs& args, cudaStream_t stream) {
  if (args.num_segments == 0 || args.num_tokens == 0) return cudaSuccess;
  switch (args.head_dim) {
    case 128:
      return Launch<128>(args, stream);
    case 96:
      return Launch<96>(args, stream);
    case 64:
      return Launch<64>(args, stream);
    case 32:
      return Launch<32>(args, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

cudaError_t LaunchPrefillAttention(const PrefillAttentionArgs& args, cudaStream_t stream) {
  return args.head_dim == 128 ? LaunchPrefillAttentionWgmma(args, stream)
                              : LaunchPrefillAttentionMma(args, stream);
}

}  // namespace millrace::engine::cuda
