#include "engine/backend/cuda/kernels/device.cuh"
#include "engine/backend/cuda/kernels/launch.cuh"
#include "engine/backend/cuda/kernels/ptx.cuh"
#include "engine/backend/cuda/kernels/qk_rope.h"

namespace millrace::engine::cuda {
namespace {

constexpr int kWarps = 8;
constexpr int kPageTokens = 64;
constexpr int kPerLane = 4;  // consecutive dimensions of a lane; head_dim <= 128

struct alignas(8) Bf16x4 {
  __nv_bfloat162 pair[2];
};

__device__ void Add(float (&x)[kPerLane], const float* values) {
  const float4 v = *reinterpret_cast<const float4*>(values);
  x[0] += v.x;
  x[1] += v.y;
  x[2] += v.z;
  x[3] += v.w;
}

__device__ void Scale(float (&x)[kPerLane], const float* weight, float scale) {
  const float4 w = *reinterpret_cast<const float4*>(weight);
  x[0] *= scale * w.x;
  x[1] *= scale * w.y;
  x[2] *= scale * w.z;
  x[3] *= scale * w.w;
}

// Lanes [0, pairs / 4) hold the first dimension of each rotated pair, the next as many lanes the second; the
// other lanes only take part in the exchange.
__device__ void Rotate(float (&x)[kPerLane], const float* cosine, int pairs, int lane) {
  const int half = pairs / kPerLane;
  const bool first = lane < half;
  const bool rotated = lane < 2 * half;
  const int partner = first ? lane + half : rotated ? lane - half : lane;
  const int at = (first || !rotated ? lane : lane - half) * kPerLane;
  float4 c = make_float4(1, 1, 1, 1);
  float4 s = make_float4(0, 0, 0, 0);
  if (rotated) {
    c = *reinterpret_cast<const float4*>(cosine + at);
    s = *reinterpret_cast<const float4*>(cosine + pairs + at);
  }
  const float sign = first ? -1.0f : 1.0f;
  const float cosines[kPerLane] = {c.x, c.y, c.z, c.w};
  const float sines[kPerLane] = {s.x, s.y, s.z, s.w};
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    const float other = __shfl_sync(kFullWarp, x[i], partner);
    x[i] = x[i] * cosines[i] + sign * other * sines[i];
  }
}

// Warp per (row, head).
__global__ void __launch_bounds__(32 * kWarps) QkRope(QkRopeArgs args) {
  ptx::LetNextLaunchBegin();
  const int heads_all = args.heads + 2 * args.kv_heads;
  const int64_t task = int64_t{blockIdx.x} * kWarps + threadIdx.x / 32;
  if (task >= int64_t{args.rows} * heads_all) return;
  const int row = static_cast<int>(task / heads_all);
  const int head = static_cast<int>(task - int64_t{row} * heads_all);
  const int lane = threadIdx.x % 32;
  const int d = lane * kPerLane;
  const bool inside = d < args.head_dim;
  const bool is_query = head < args.heads;
  const int slot = args.kv_slots[row];
  const float* const rope = args.rope + static_cast<int64_t>(args.positions[row]) * 2 * args.pairs;
  ptx::WaitForEarlierLaunches();
  if (!is_query && slot < 0) return;
  float x[kPerLane] = {};
  if (inside) {
    const Bf16x4 in = *reinterpret_cast<const Bf16x4*>(args.qkv + task * args.head_dim + d);
    const float2 low = __bfloat1622float2(in.pair[0]);
    const float2 high = __bfloat1622float2(in.pair[1]);
    x[0] = low.x;
    x[1] = low.y;
    x[2] = high.x;
    x[3] = high.y;
    if (args.bias != nullptr) Add(x, args.bias + head * args.head_dim + d);
  }
  if (head < args.heads + args.kv_heads) {
    const float* const weight = is_query ? args.query_norm : args.key_norm;
    if (weight != nullptr) {
      const float sum = WarpSum(x[0] * x[0] + x[1] * x[1] + x[2] * x[2] + x[3] * x[3]);
      const float scale = rsqrtf(sum / static_cast<float>(args.head_dim) + args.eps);
      if (inside) Scale(x, weight + d, scale);
    }
    Rotate(x, rope, args.pairs, lane);
  }
  if (!inside) return;
  const Bf16x4 out = {{__floats2bfloat162_rn(x[0], x[1]), __floats2bfloat162_rn(x[2], x[3])}};
  bf16* to = nullptr;
  if (is_query) {
    to = args.query + (static_cast<int64_t>(row) * args.heads + head) * args.head_dim;
  } else {  // V heads follow the K heads here as in the page
    const int64_t piece = static_cast<int64_t>(slot / kPageTokens) * 2 * args.kv_heads + head - args.heads;
    to = args.kv_layer + (piece * kPageTokens + slot % kPageTokens) * args.head_dim;
  }
  *reinterpret_cast<Bf16x4*>(to + d) = out;
}

}  // namespace

cudaError_t LaunchQkRope(const QkRopeArgs& args, cudaStream_t stream) {
  if (args.rows == 0) return cudaSuccess;
  if (args.head_dim % 8 != 0 || args.head_dim > 32 * kPerLane || args.pairs % kPerLane != 0)
    return cudaErrorInvalidValue;
  const int64_t tasks = int64_t{args.rows} * (args.heads + 2 * args.kv_heads);
  return LaunchOverlapped(QkRope, static_cast<unsigned>((tasks + kWarps - 1) / kWarps), 32 * kWarps, 0,
                          stream, args);
}

}  // namespace millrace::engine::cuda
