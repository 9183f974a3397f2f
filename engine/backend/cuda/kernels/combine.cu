#include "engine/backend/cuda/kernels/combine.cuh"
#include "engine/backend/cuda/kernels/combine.h"
#include "engine/backend/cuda/kernels/launch.cuh"
#include "engine/backend/cuda/kernels/ptx.cuh"

namespace millrace::engine::cuda {
namespace {

constexpr int kAhead = 10;  // loads in flight: a token's eight choices and a shared expert fit

// Block per row. Dynamic shared memory: the new residual row, [hidden] floats.
__global__ void __launch_bounds__(kCombineThreads) Combine(CombineArgs args) {
  extern __shared__ float4 row4[];
  __shared__ float scratch[kCombineThreads / 32];
  ptx::LetNextLaunchBegin();
  const bool padding = static_cast<int>(blockIdx.x) >= *args.valid_rows;
  const NormWeights<kCombineThreads> norm(args.norm_weight, args.hidden);
  ptx::WaitForEarlierLaunches();
  if (padding) return;
  const int64_t row = blockIdx.x;
  const auto* const in =
      reinterpret_cast<const Bf16x8*>(args.expert_out + row * args.slots_per_token * args.hidden);
  const int columns = args.hidden / 8;
  CombineRow(args.residual + row * args.hidden, norm, args.normed + row * args.hidden, args.hidden, args.eps,
             row4, scratch, [&](int i, float(&sum)[8]) {
               for (int first = 0; first < args.slots_per_token; first += kAhead) {
                 Bf16x8 rows[kAhead];
#pragma unroll
                 for (int j = 0; j < kAhead; ++j) {
                   if (first + j < args.slots_per_token) rows[j] = in[int64_t{first + j} * columns + i];
                 }
#pragma unroll
                 for (int j = 0; j < kAhead; ++j) {
                   if (first + j < args.slots_per_token) AddTo(sum, rows[j]);
                 }
               }
             });
}

}  // namespace

cudaError_t LaunchCombine(const CombineArgs& args, cudaStream_t stream) {
  if (args.rows == 0) return cudaSuccess;
  if (args.hidden % 8 != 0) return cudaErrorInvalidValue;
  return LaunchOverlapped(Combine, args.rows, kCombineThreads, args.hidden * sizeof(float), stream, args);
}

}  // namespace millrace::engine::cuda
