#include "engine/backend/cuda/kernels/device.cuh"
#include "engine/backend/cuda/kernels/launch.cuh"
#include "engine/backend/cuda/kernels/norm.h"
#include "engine/backend/cuda/kernels/ptx.cuh"

namespace millrace::engine::cuda {
namespace {

constexpr int kThreads = 256;

__global__ void __launch_bounds__(kThreads) Embed(EmbedArgs args) {
  ptx::LetNextLaunchBegin();
  const auto* row = reinterpret_cast<const Bf16x8*>(
      args.table + static_cast<int64_t>(args.tokens[blockIdx.x]) * args.hidden);
  auto* out = reinterpret_cast<float4*>(args.residual + static_cast<int64_t>(blockIdx.x) * args.hidden);
  for (int i = threadIdx.x; i < args.hidden / 8; i += kThreads) {
    float wide[8];
    Widen(row[i], wide);
    out[2 * i] = make_float4(wide[0], wide[1], wide[2], wide[3]);
    out[2 * i + 1] = make_float4(wide[4], wide[5], wide[6], wide[7]);
  }
}

// 1 / sqrt(mean of squares + eps) of a row that lies in shared memory; each thread owns columns i, i +
// kThreads...
__device__ float InverseRms(const float* row, int hidden, float eps, float* scratch) {
  float sum = 0;
  for (int i = threadIdx.x; i < hidden; i += kThreads) sum += row[i] * row[i];
  return rsqrtf(BlockSum(sum, scratch) / static_cast<float>(hidden) + eps);
}

// Dynamic shared memory: the row, [hidden] floats. A thread reads back what it wrote itself.
__global__ void __launch_bounds__(kThreads) RmsNorm(RmsNormArgs args) {
  extern __shared__ float4 row4[];
  __shared__ float scratch[kThreads / 32];
  ptx::LetNextLaunchBegin();
  ptx::WaitForEarlierLaunches();
  const int64_t source = args.index == nullptr ? blockIdx.x : args.index[blockIdx.x];
  auto* const x = reinterpret_cast<float4*>(args.residual + source * args.hidden);
  const auto* const bias = reinterpret_cast<const float4*>(args.bias);
  float sum = 0;
  for (int i = threadIdx.x; i < args.hidden / 4; i += kThreads) {
    float4 v = x[i];
    if (bias != nullptr) {
      const float4 b = bias[i];
      v = make_float4(v.x + b.x, v.y + b.y, v.z + b.z, v.w + b.w);
      x[i] = v;
    }
    row4[i] = v;
    sum += v.x * v.x + v.y * v.y + v.z * v.z + v.w * v.w;
  }
  const float scale = rsqrtf(BlockSum(sum, scratch) / static_cast<float>(args.hidden) + args.eps);
  const auto* const weight = reinterpret_cast<const float4*>(args.weight);
  auto* const out =
      reinterpret_cast<__nv_bfloat162*>(args.out + static_cast<int64_t>(blockIdx.x) * args.hidden);
  for (int i = threadIdx.x; i < args.hidden / 4; i += kThreads) {
    const float4 v = row4[i];
    const float4 w = weight[i];
    out[2 * i] = __floats2bfloat162_rn(v.x * scale * w.x, v.y * scale * w.y);
    out[2 * i + 1] = __floats2bfloat162_rn(v.z * scale * w.z, v.w * scale * w.w);
  }
}

// Dynamic shared memory: one row, [hidden] floats; a thread touches only its own columns.
__global__ void __launch_bounds__(kThreads) MtpInput(MtpInputArgs args) {
  extern __shared__ float4 row4[];
  auto* const row = reinterpret_cast<float*>(row4);
  __shared__ float scratch[kThreads / 32];
  bf16* const out = args.out + static_cast<int64_t>(blockIdx.x) * 2 * args.hidden;
  const bf16* const embedding = args.table + static_cast<int64_t>(args.next_tokens[blockIdx.x]) * args.hidden;
  for (int i = threadIdx.x; i < args.hidden; i += kThreads) row[i] = __bfloat162float(embedding[i]);
  float scale = InverseRms(row, args.hidden, args.eps, scratch);
  for (int i = threadIdx.x; i < args.hidden; i += kThreads) {
    out[i] = __float2bfloat16_rn(row[i] * scale * args.embedding_norm[i]);
  }
  const float* const x = args.residual + static_cast<int64_t>(args.index[blockIdx.x]) * args.hidden;
  for (int i = threadIdx.x; i < args.hidden; i += kThreads) row[i] = x[i];
  scale = InverseRms(row, args.hidden, args.eps, scratch);
  for (int i = threadIdx.x; i < args.hidden; i += kThreads) row[i] *= scale * args.final_norm[i];
  scale = InverseRms(row, args.hidden, args.eps, scratch);
  for (int i = threadIdx.x; i < args.hidden; i += kThreads) {
    out[args.hidden + i] = __float2bfloat16_rn(row[i] * scale * args.hidden_norm[i]);
  }
}

__device__ float Silu(float x) { return x / (1.0f + expf(-x)); }

__global__ void __launch_bounds__(kThreads) Swiglu(SwigluArgs args) {
  ptx::LetNextLaunchBegin();
  ptx::WaitForEarlierLaunches();
  const int64_t count = static_cast<int64_t>(args.rows) * args.width / 8;
  const auto* const in = reinterpret_cast<const Bf16x8*>(args.gate_up);
  auto* const out = reinterpret_cast<Bf16x8*>(args.out);
  for (int64_t i = blockIdx.x * int64_t{kThreads} + threadIdx.x; i < count;
       i += int64_t{gridDim.x} * kThreads) {
    float low[8], high[8], result[8];
    Widen(in[2 * i], low);
    Widen(in[2 * i + 1], high);
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      result[j] = Silu(low[2 * j]) * low[2 * j + 1];
      result[4 + j] = Silu(high[2 * j]) * high[2 * j + 1];
    }
    out[i] = Narrow(result);
  }
}

}  // namespace

cudaError_t LaunchEmbed(const EmbedArgs& args, cudaStream_t stream) {
  if (args.rows == 0) return cudaSuccess;
  if (args.hidden % 8 != 0) return cudaErrorInvalidValue;
  Embed<<<args.rows, kThreads, 0, stream>>>(args);
  return cudaGetLastError();
}

cudaError_t LaunchRmsNorm(const RmsNormArgs& args, cudaStream_t stream) {
  if (args.rows == 0) return cudaSuccess;
  if (args.hidden % 8 != 0 || (args.bias != nullptr && args.index != nullptr)) return cudaErrorInvalidValue;
  return LaunchOverlapped(RmsNorm, args.rows, kThreads, args.hidden * sizeof(float), stream, args);
}

cudaError_t LaunchMtpInput(const MtpInputArgs& args, cudaStream_t stream) {
  if (args.rows == 0) return cudaSuccess;
  MtpInput<<<args.rows, kThreads, args.hidden * sizeof(float), stream>>>(args);
  return cudaGetLastError();
}

cudaError_t LaunchSwiglu(const SwigluArgs& args, cudaStream_t stream) {
  if (args.rows == 0) return cudaSuccess;
  if (args.width % 8 != 0) return cudaErrorInvalidValue;
  const int64_t blocks = (static_cast<int64_t>(args.rows) * args.width / 8 + kThreads - 1) / kThreads;
  return LaunchOverlapped(Swiglu, static_cast<unsigned>(blocks < 4096 ? blocks : 4096), kThreads, 0, stream,
                          args);
}

}  // namespace millrace::engine::cuda
