#include "engine/backend/cuda/kernels/device.cuh"
#include "engine/backend/cuda/kernels/qk_rope.h"

namespace millrace::engine::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kPageTokens = 64;

// Block per row. Dynamic shared memory: the row in fp32. A warp owns a head from the norm on.
__global__ void __launch_bounds__(kThreads) QkRope(QkRopeArgs args) {
  extern __shared__ float row[];
  const int width = (args.heads + 2 * args.kv_heads) * args.head_dim;
  const auto* const in = reinterpret_cast<const Bf16x8*>(args.qkv + static_cast<int64_t>(blockIdx.x) * width);
  for (int i = threadIdx.x; i < width / 8; i += kThreads) {
    float wide[8];
    Widen(in[i], wide);
#pragma unroll
    for (int j = 0; j < 8; ++j)
      row[8 * i + j] = wide[j] + (args.bias == nullptr ? 0.0f : args.bias[8 * i + j]);
  }
  __syncthreads();  // heads are read by other threads than those that loaded them
  const int lane = threadIdx.x % 32;
  const int position = args.positions[blockIdx.x];
  const int slot = args.kv_slots[blockIdx.x];
  const float* const cosine = args.rope + static_cast<int64_t>(position) * 2 * args.pairs;
  const float* const sine = cosine + args.pairs;
  const int64_t head_elements = int64_t{kPageTokens} * args.head_dim;
  bf16* const page = args.kv_layer +
                     static_cast<int64_t>(slot / kPageTokens) * 2 * args.kv_heads * head_elements +
                     static_cast<int64_t>(slot % kPageTokens) * args.head_dim;
  for (int head = threadIdx.x / 32; head < args.heads + 2 * args.kv_heads; head += kThreads / 32) {
    float* const x = row + head * args.head_dim;
    const bool is_query = head < args.heads;
    const bool is_value = head >= args.heads + args.kv_heads;
    bf16* out = nullptr;
    if (is_query) {
      out = args.query + (static_cast<int64_t>(blockIdx.x) * args.heads + head) * args.head_dim;
    } else if (slot >= 0) {
      out = page + (head - args.heads) * head_elements;  // V heads follow the K heads here as in the page
    }
    if (!is_value) {
      const float* const weight = is_query ? args.query_norm : args.key_norm;
      if (weight != nullptr) {
        float sum = 0;
        for (int d = lane; d < args.head_dim; d += 32) sum += x[d] * x[d];
        const float scale = rsqrtf(WarpSum(sum) / static_cast<float>(args.head_dim) + args.eps);
        for (int d = lane; d < args.head_dim; d += 32) x[d] *= scale * weight[d];
        __syncwarp();  // rotation reads dimensions that other lanes wrote
      }
      for (int i = lane; i < args.pairs; i += 32) {
        const float a = x[i];
        const float b = x[i + args.pairs];
        x[i] = a * cosine[i] - b * sine[i];
        x[i + args.pairs] = b * cosine[i] + a * sine[i];
      }
      __syncwarp();  // the store below reads what other lanes rotated
    }
    if (out == nullptr) continue;
    for (int i = lane; i < args.head_dim / 8; i += 32) {
      float wide[8];
#pragma unroll
      for (int j = 0; j < 8; ++j) wide[j] = x[8 * i + j];
      reinterpret_cast<Bf16x8*>(out)[i] = Narrow(wide);
    }
  }
}

}  // namespace

cudaError_t LaunchQkRope(const QkRopeArgs& args, cudaStream_t stream) {
  if (args.rows == 0) return cudaSuccess;
  if (args.head_dim % 8 != 0) return cudaErrorInvalidValue;
  const size_t shared = static_cast<size_t>(args.heads + 2 * args.kv_heads) * args.head_dim * sizeof(float);
  if (shared > 48 << 10) {
    const cudaError_t raised =
        cudaFuncSetAttribute(QkRope, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared));
    if (raised != cudaSuccess) return raised;
  }
  QkRope<<<args.rows, kThreads, shared, stream>>>(args);
  return cudaGetLastError();
}

}  // namespace millrace::engine::cuda
