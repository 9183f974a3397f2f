#include <cuda_fp16.h>

#include "engine/backend/cuda/kernels/combine.cuh"
#include "engine/backend/cuda/kernels/few_rows.h"
#include "engine/backend/cuda/kernels/launch.cuh"
#include "engine/backend/cuda/kernels/ptx.cuh"
#include "engine/backend/cuda/kernels/quantize.cuh"
#include "engine/backend/cuda/kernels/router.cuh"

namespace millrace::engine::cuda {
namespace {

constexpr int kWarps = 8;
constexpr int kThreads = 32 * kWarps;
constexpr int kAhead = 8;  // 16-byte loads of weights in flight per lane: 2048 of k

// Weights are read once: past L1.
__device__ __forceinline__ Bf16x8 LoadOnce(const Bf16x8* address) {
  Bf16x8 value;
  auto& words = reinterpret_cast<uint4&>(value);
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(words.x), "=r"(words.y), "=r"(words.z), "=r"(words.w)
               : "l"(address));
  return value;
}

// A warp's row of weights, kAhead loads of it in registers. Lane l holds columns 8 (l + 32 i).
struct WeightRow {
  const Bf16x8* row;
  int columns;  // k / 8
  Bf16x8 ahead[kAhead];
  __device__ __forceinline__ void Load(int base, int lane) {
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      if (base + i * 32 + lane < columns) ahead[i] = LoadOnce(row + base + i * 32 + lane);
    }
  }
};

__device__ __forceinline__ float Dot(const Bf16x8& a, const Bf16x8& b, float sum) {
  float wide_a[8], wide_b[8];
  Widen(a, wide_a);
  Widen(b, wide_b);
#pragma unroll
  for (int i = 0; i < 8; ++i) sum = fmaf(wide_a[i], wide_b[i], sum);
  return sum;
}

// sums[r] of the whole warp: weights x[r], where x[r] begins at x + r * columns (global or shared memory).
// The first kAhead loads of the weights have been made.
template <int kRows>
__device__ __forceinline__ void Multiply(WeightRow& weights, const Bf16x8* x, int lane,
                                         float (&sums)[kRows]) {
#pragma unroll
  for (int r = 0; r < kRows; ++r) sums[r] = 0;
  for (int base = 0; base < weights.columns; base += 32 * kAhead) {
    if (base > 0) weights.Load(base, lane);
    constexpr int kTogether =
        kRows == 1 ? kAhead : kAhead / 2;  // loads of x in flight; more rows, fewer registers
#pragma unroll
    for (int first = 0; first < kAhead; first += kTogether) {
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        Bf16x8 values[kTogether];
#pragma unroll
        for (int i = 0; i < kTogether; ++i) {
          const int at = base + (first + i) * 32 + lane;
          if (at < weights.columns) values[i] = x[static_cast<int64_t>(r) * weights.columns + at];
        }
#pragma unroll
        for (int i = 0; i < kTogether; ++i) {
          if (base + (first + i) * 32 + lane < weights.columns) {
            sums[r] = Dot(weights.ahead[first + i], values[i], sums[r]);
          }
        }
      }
    }
  }
#pragma unroll
  for (int r = 0; r < kRows; ++r) sums[r] = WarpSum(sums[r]);
}

template <int kRows>
__global__ void __launch_bounds__(kThreads, 3) FewRowsGemm(const FewRowsGemmArgs args) {
  const int lane = threadIdx.x % 32;
  const int64_t n = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32;
  ptx::LetNextLaunchBegin();
  if (n >= args.n) return;  // other warps wait
  WeightRow weights;
  weights.columns = args.k / 8;
  weights.row = reinterpret_cast<const Bf16x8*>(args.weights) + n * weights.columns;
  weights.Load(0, lane);
  ptx::WaitForEarlierLaunches();
  float sums[kRows];
  Multiply<kRows>(weights, reinterpret_cast<const Bf16x8*>(args.x), lane, sums);
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    if (lane != r) continue;
    const int64_t at = static_cast<int64_t>(r) * args.n + n;
    if (args.out_float) {
      auto* const out = static_cast<float*>(args.out) + at;
      *out = args.accumulate ? *out + sums[r] : sums[r];
    } else {
      auto* const out = static_cast<bf16*>(args.out) + at;
      *out = __float2bfloat16_rn(args.accumulate ? __bfloat162float(*out) + sums[r] : sums[r]);
    }
  }
}

// A warp per expert for the logits; then the last block to end goes on alone. Dynamic shared memory: the
// normed rows, [rows, hidden] bf16.
template <int kRows, int kPerLane>
__global__ void __launch_bounds__(kThreads) FewRowsRoute(const FewRowsRouteArgs args) {
  extern __shared__ Bf16x8 normed[];
  __shared__ float scratch[kWarps];
  __shared__ float choices[kRows][32 * kPerLane];
  __shared__ float bias[kExpertsMax];
  __shared__ bool is_last;
  const int lane = threadIdx.x % 32;
  const int warp = threadIdx.x / 32;
  const int columns = args.hidden / 8;
  const int expert = blockIdx.x * kWarps + warp;
  ptx::LetNextLaunchBegin();
  WeightRow weights;
  weights.columns = columns;
  weights.row = reinterpret_cast<const Bf16x8*>(args.router) +
                static_cast<int64_t>(min(expert, args.select.num_experts - 1)) * columns;
  weights.Load(0, lane);
  const NormWeights<kThreads> norm(args.norm_weight, args.hidden);
  const int rows = min(*args.select.valid_rows, kRows);
  if (args.select.bias != nullptr) {
    for (int i = threadIdx.x; i < args.select.num_experts; i += kThreads)
      bias[i] = __ldg(args.select.bias + i);
  }
  ptx::WaitForEarlierLaunches();
  for (int r = 0; r < kRows; ++r) {
    const auto* const x =
        reinterpret_cast<const float4*>(args.residual) + static_cast<int64_t>(r) * columns * 2;
    float squares = 0;
    for (int i = threadIdx.x; i < columns * 2; i += kThreads) {
      const float4 v = x[i];
      squares += v.x * v.x + v.y * v.y + v.z * v.z + v.w * v.w;
    }
    const float scale = rsqrtf(BlockSum(squares, scratch) / static_cast<float>(args.hidden) + args.eps);
    for (int i = threadIdx.x; i < columns; i += kThreads) {
      const float4 a = x[2 * i], b = x[2 * i + 1];
      const float4 v = norm.At(i, 0), u = norm.At(i, 1);
      const float wide[8] = {a.x * scale * v.x, a.y * scale * v.y, a.z * scale * v.z, a.w * scale * v.w,
                             b.x * scale * u.x, b.y * scale * u.y, b.z * scale * u.z, b.w * scale * u.w};
      const Bf16x8 narrow = Narrow(wide);
      normed[r * columns + i] = narrow;
      if (blockIdx.x == 0)
        reinterpret_cast<Bf16x8*>(args.normed)[static_cast<int64_t>(r) * columns + i] = narrow;
    }
  }
  __syncthreads();  // the normed rows are there
  float sums[kRows];
  Multiply<kRows>(weights, normed, lane, sums);
  if (expert < args.select.num_experts) {
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      if (lane == r) args.logits[static_cast<int64_t>(r) * args.select.num_experts + expert] = sums[r];
    }
  }
  __syncthreads();  // of all warps
  if (threadIdx.x == 0) {
    __threadfence();  // the block's logits are visible before the count says so
    is_last = atomicAdd(args.blocks_done, 1) == static_cast<int>(gridDim.x) - 1;
    if (is_last) *args.blocks_done = 0;
    __threadfence();  // the other blocks' logits are read after the count
  }
  __syncthreads();  // is_last
  if (!is_last || warp >= kRows) return;
  SelectExpertsArgs select = args.select;
  if (select.bias != nullptr) select.bias = bias;
  int id = -1;
  float weight = 0;
  if (warp < rows) {
    SelectRow<kPerLane>(select, args.logits + static_cast<int64_t>(warp) * select.num_experts, lane,
                        choices[warp], id, weight);
  }
  if (lane < select.top_k) {
    select.experts[warp * select.top_k + lane] = id;
    select.weights[warp * select.top_k + lane] = weight;
  }
}

// The slots' experts, shared ones first: their weights need not wait for the routing.
struct Slot {
  int token;
  int choice;
  __device__ __forceinline__ Slot(const FewRowsExpertsArgs& args, int ordinal)
      : token(ordinal % args.tokens), choice(args.top_k + args.num_shared - 1 - ordinal / args.tokens) {}
  __device__ __forceinline__ int number(const FewRowsExpertsArgs& args) const {
    return token * (args.top_k + args.num_shared) + choice;
  }
};

// Sixteen codes of e4m3 as floats.
__device__ __forceinline__ void WidenCodes(const Bf16x8& codes, float (&wide)[16]) {
  const auto& words = reinterpret_cast<const uint32_t(&)[4]>(codes);
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const auto two = static_cast<uint16_t>(words[i / 2] >> (16 * (i % 2)));
    uint32_t halves;
    asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(halves) : "h"(two));
    const float2 pair = __half22float2(reinterpret_cast<const __half2&>(halves));
    wide[2 * i] = pair.x;
    wide[2 * i + 1] = pair.y;
  }
}

// Dynamic shared memory of e4m3: the quantised row, [k] bf16 (which hold e4m3 exactly), then its scales.
template <ExpertType kType, bool kGateUp, int kRows, int kChunks>
__global__ void __launch_bounds__(kThreads, 2) FewRowsExperts(const FewRowsExpertsArgs args) {
  constexpr bool kE4m3 = kType == ExpertType::kE4m3;
  constexpr int kElements = kE4m3 ? 16 : 8;  // of a 16-byte load
  extern __shared__ Bf16x8 codes[];
  const int lane = threadIdx.x % 32;
  const int warp = threadIdx.x / 32;
  const int parts = (args.rows + kWarps * kRows - 1) / (kWarps * kRows);  // blocks of a slot
  const Slot slot(args, blockIdx.x / parts);
  const int row = (blockIdx.x % parts * kWarps + warp) * kRows;  // the warp's first
  const bool inside = row < args.rows && slot.token < *args.valid_rows;
  const bool shared_expert = slot.choice >= args.top_k;
  // Routed experts of gate and up are the launch before's; of down they are older: the launch before has let
  // this one begin only after its own wait.
  if (kGateUp && !shared_expert) ptx::WaitForEarlierLaunches();
  int expert = args.num_experts + slot.choice - args.top_k;
  if (!shared_expert && inside) expert = __ldcg(args.experts + slot.token * args.top_k + slot.choice);
  const int columns = args.k / kElements;
  const int64_t first = inside ? (static_cast<int64_t>(expert) * args.rows + row) * columns : 0;
  const auto* const weights = static_cast<const Bf16x8*>(args.weights) + first;
  Bf16x8 ahead[kRows][kChunks];
  float scales[kE4m3 ? kRows : 1][kE4m3 ? kChunks : 1];
  const auto load = [&](int base) {
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
#pragma unroll
      for (int c = 0; c < kChunks; ++c) {
        const int at = base + c * 32 + lane;
        if (at >= columns) continue;
        ahead[r][c] = LoadOnce(weights + static_cast<int64_t>(r) * columns + at);
        if constexpr (kE4m3) {
          const int blocks = args.k / kScaleBlock;
          const int row_blocks = args.rows / kScaleBlock;
          const int block =
              kGateUp ? r % 2 * (row_blocks / 2) + (row + r) / 2 / kScaleBlock : (row + r) / kScaleBlock;
          scales[r][c] = __ldg(args.weight_scales +
                               (static_cast<int64_t>(expert) * row_blocks + block) * blocks + at / 8);
        }
      }
    }
  };
  if (inside) load(0);
  if (!kGateUp || shared_expert) ptx::WaitForEarlierLaunches();
  ptx::LetNextLaunchBegin();
  const auto* const x = reinterpret_cast<const Bf16x8*>(args.x) +
                        static_cast<int64_t>(kGateUp ? slot.token : slot.number(args)) * (args.k / 8);
  [[maybe_unused]] auto* const x_scales = reinterpret_cast<float*>(codes + args.k / 8);
  if constexpr (kE4m3) {
    for (int base = 0; base < args.k / 8; base += kThreads) {
      const int i = base + static_cast<int>(threadIdx.x);
      float values[8] = {};
      if (i < args.k / 8) Widen(x[i], values);
      float scale;
      const uint2 packed = QuantizeBlock(values, scale);
      if (i >= args.k / 8) continue;
      float wide[16];
      Bf16x8 both;
      reinterpret_cast<uint4&>(both) = make_uint4(packed.x, packed.y, 0, 0);
      WidenCodes(both, wide);
      codes[i] = Narrow(reinterpret_cast<const float(&)[8]>(wide));
      if (i % 16 == 0) x_scales[i / 16] = scale;
    }
    __syncthreads();  // the quantised row is there
  }
  if (!inside) return;
  float sums[kRows] = {};
  for (int base = 0; base < columns; base += 32 * kChunks) {
    if (base > 0) load(base);
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
      const int at = base + c * 32 + lane;
      if (at >= columns) continue;
      if constexpr (kE4m3) {
        float wide_x[16];
        Widen(codes[2 * at], reinterpret_cast<float(&)[8]>(wide_x[0]));
        Widen(codes[2 * at + 1], reinterpret_cast<float(&)[8]>(wide_x[8]));
        const float x_scale = x_scales[at / 8];
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
          float wide[16];
          WidenCodes(ahead[r][c], wide);
          float sum = 0;
#pragma unroll
          for (int i = 0; i < 16; ++i) sum = fmaf(wide[i], wide_x[i], sum);
          sums[r] = fmaf(sum, scales[r][c] * x_scale, sums[r]);
        }
      } else {
        const Bf16x8 value = x[at];
#pragma unroll
        for (int r = 0; r < kRows; ++r) sums[r] = Dot(ahead[r][c], value, sums[r]);
      }
    }
  }
#pragma unroll
  for (int r = 0; r < kRows; ++r) sums[r] = WarpSum(sums[r]);
  const int64_t number = slot.number(args);
  if constexpr (kGateUp) {
#pragma unroll
    for (int r = 0; r < kRows; r += 2) {
      const float silu = __fdividef(sums[r], 1.0f + __expf(-sums[r]));
      if (lane == r / 2)
        args.out[number * (args.rows / 2) + (row + r) / 2] = __float2bfloat16_rn(silu * sums[r + 1]);
    }
  } else {
    const float scale =
        shared_expert ? 1.0f : __ldcg(args.expert_weights + slot.token * args.top_k + slot.choice);
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      if (lane == r) args.out[number * args.rows + row + r] = __float2bfloat16_rn(scale * sums[r]);
    }
  }
}

template <ExpertType kType, bool kGateUp, int kRows, int kChunks>
cudaError_t LaunchExperts(const FewRowsExpertsArgs& args, cudaStream_t stream) {
  const int parts = (args.rows + kWarps * kRows - 1) / (kWarps * kRows);
  const unsigned blocks = static_cast<unsigned>(parts * args.tokens * (args.top_k + args.num_shared));
  const size_t shared =
      kType == ExpertType::kE4m3 ? args.k * sizeof(bf16) + args.k / kScaleBlock * sizeof(float) : 0;
  return LaunchOverlapped(FewRowsExperts<kType, kGateUp, kRows, kChunks>, blocks, kThreads, shared, stream,
                          args);
}

template <int kRows>
cudaError_t LaunchRoute(const FewRowsRouteArgs& args, cudaStream_t stream) {
  const unsigned blocks = (args.select.num_experts + kWarps - 1) / kWarps;
  const size_t shared = static_cast<size_t>(kRows) * args.hidden * sizeof(bf16);
  if (args.select.num_experts <= 256) {
    return LaunchOverlapped(FewRowsRoute<kRows, 8>, blocks, kThreads, shared, stream, args);
  }
  return LaunchOverlapped(FewRowsRoute<kRows, kExpertsMax / 32>, blocks, kThreads, shared, stream, args);
}

}  // namespace

cudaError_t LaunchFewRowsGemm(const FewRowsGemmArgs& args, cudaStream_t stream) {
  if (args.rows < 1 || args.rows > kFewRowsMax || args.k % 8 != 0) return cudaErrorInvalidValue;
  const unsigned blocks = (args.n + kWarps - 1) / kWarps;
  const auto kernel = args.rows == 1 ? FewRowsGemm<1> : FewRowsGemm<2>;
  return LaunchOverlapped(kernel, blocks, kThreads, 0, stream, args);
}

cudaError_t LaunchFewRowsRoute(const FewRowsRouteArgs& args, cudaStream_t stream) {
  const SelectExpertsArgs& select = args.select;
  if (select.num_experts > kExpertsMax || select.top_k > kTopKMax || select.num_groups > kGroupsMax ||
      (select.num_groups > 0 && select.num_experts % select.num_groups != 0) || args.hidden % 8 != 0 ||
      args.hidden > kFewRowsHiddenMax) {
    return cudaErrorInvalidValue;
  }
  if (select.rows < 1 || select.rows > kFewRowsMax) return cudaErrorInvalidValue;
  return select.rows == 1 ? LaunchRoute<1>(args, stream) : LaunchRoute<2>(args, stream);
}

cudaError_t LaunchFewRowsExperts(const FewRowsExpertsArgs& args, cudaStream_t stream) {
  const bool e4m3 = args.type == ExpertType::kE4m3;
  if (args.tokens < 1 || args.tokens > kFewRowsMax || args.rows % (e4m3 ? kScaleBlock : 16) != 0 ||
      args.k % (e4m3 ? kScaleBlock : 8) != 0 || args.k > 8192) {
    return cudaErrorInvalidValue;
  }
  if (args.matrix == ExpertMatrix::kGateUp) {
    return e4m3 ? LaunchExperts<ExpertType::kE4m3, true, 2, 4>(args, stream)
                : LaunchExperts<ExpertType::kBf16, true, 2, 8>(args, stream);
  }
  return e4m3 ? LaunchExperts<ExpertType::kE4m3, false, 8, 1>(args, stream)
              : LaunchExperts<ExpertType::kBf16, false, 4, 2>(args, stream);
}

}  // namespace millrace::engine::cuda
