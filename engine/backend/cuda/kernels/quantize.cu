#include "engine/backend/cuda/kernels/launch.cuh"
#include "engine/backend/cuda/kernels/ptx.cuh"
#include "engine/backend/cuda/kernels/quantize.cuh"
#include "engine/backend/cuda/kernels/quantize.h"

namespace millrace::engine::cuda {
namespace {

constexpr int kBlock = 128;
constexpr int kThreads = 256;

// Half a warp per block of 128: 8 elements per thread.
__global__ void __launch_bounds__(kThreads) QuantizeRows(const QuantizeRowsArgs args, int64_t num_blocks) {
  ptx::WaitForEarlierLaunches();
  ptx::LetNextLaunchBegin();
  const int blocks_per_row = args.k / kBlock;
  const int lane = threadIdx.x % 16;
  const int64_t block = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) / 16;
  const bool inside = block < num_blocks;  // quantising needs every lane
  const int64_t row = inside ? block / blocks_per_row : 0;
  const int64_t column = inside ? block % blocks_per_row * kBlock + lane * 8 : lane * 8;
  float values[8];
  Widen(*reinterpret_cast<const Bf16x8*>(args.x + row * args.x_stride + column), values);
  float scale;
  const uint2 codes = QuantizeBlock(values, scale);
  if (!inside) return;
  *reinterpret_cast<uint2*>(args.q + row * args.k + column) = codes;
  if (lane == 0) args.scales[block] = scale;
}

}  // namespace

cudaError_t LaunchQuantizeRows(const QuantizeRowsArgs& args, cudaStream_t stream) {
  if (args.k % kBlock != 0 || args.x_stride % 8 != 0) return cudaErrorInvalidValue;
  if (args.num_rows == 0) return cudaSuccess;
  const int64_t num_blocks = static_cast<int64_t>(args.num_rows) * (args.k / kBlock);
  const int64_t ctas = (num_blocks * 16 + kThreads - 1) / kThreads;
  return LaunchOverlapped(QuantizeRows, static_cast<unsigned>(ctas), kThreads, 0, stream, args, num_blocks);
}

}  // namespace millrace::engine::cuda
