#include "engine/backend/cuda/kernels/quantize.h"

namespace millrace::engine::cuda {
namespace {

constexpr int kBlock = 128;
constexpr int kThreads = 256;
constexpr float kE4m3Max = 448.0f;

// Half a warp per block of 128: 8 elements per thread.
__global__ void __launch_bounds__(kThreads) QuantizeRows(const QuantizeRowsArgs args, int64_t num_blocks) {
  const int blocks_per_row = args.k / kBlock;
  const int lane = threadIdx.x % 16;
  const int64_t block = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) / 16;
  const bool inside = block < num_blocks;  // the shuffles below need every lane
  const int64_t row = inside ? block / blocks_per_row : 0;
  const int64_t column = inside ? block % blocks_per_row * kBlock + lane * 8 : lane * 8;
  const uint4 loaded = *reinterpret_cast<const uint4*>(args.x + row * args.x_stride + column);
  const auto* pairs = reinterpret_cast<const __nv_bfloat162*>(&loaded);
  float values[8];
  float largest = 0;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float2 pair = __bfloat1622float2(pairs[i]);
    values[2 * i] = pair.x;
    values[2 * i + 1] = pair.y;
    largest = fmaxf(largest, fmaxf(fabsf(pair.x), fabsf(pair.y)));
  }
#pragma unroll
  for (int step = 1; step < 16; step *= 2)
    largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, step));
  const float scale = largest > 0 ? largest / kE4m3Max : 1.0f;
  uint32_t packed[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    uint16_t halves[2];
#pragma unroll
    for (int j = 0; j < 2; ++j) {  // the first operand goes to the high byte
      const float* pair = values + 4 * i + 2 * j;
      asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;"
          : "=h"(halves[j])
          : "f"(pair[1] / scale), "f"(pair[0] / scale));
    }
    packed[i] = halves[0] | static_cast<uint32_t>(halves[1]) << 16;
  }
  if (!inside) return;
  *reinterpret_cast<uint2*>(args.q + row * args.k + column) = make_uint2(packed[0], packed[1]);
  if (lane == 0) args.scales[block] = scale;
}

}  // namespace

cudaError_t LaunchQuantizeRows(const QuantizeRowsArgs& args, cudaStream_t stream) {
  if (args.k % kBlock != 0 || args.x_stride % 8 != 0) return cudaErrorInvalidValue;
  if (args.num_rows == 0) return cudaSuccess;
  const int64_t num_blocks = static_cast<int64_t>(args.num_rows) * (args.k / kBlock);
  const int64_t ctas = (num_blocks * 16 + kThreads - 1) / kThreads;
  QuantizeRows<<<static_cast<unsigned>(ctas), kThreads, 0, stream>>>(args, num_blocks);
  return cudaGetLastError();
}

}  // namespace millrace::engine::cuda
