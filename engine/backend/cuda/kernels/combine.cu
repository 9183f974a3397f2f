#include "engine/backend/cuda/kernels/combine.cuh"
#include "engine/backend/cuda/kernels/combine.h"

namespace millrace::engine::cuda {
namespace {

// Block per row. Dynamic shared memory: the new residual row, [hidden] floats.
__global__ void __launch_bounds__(kCombineThreads) Combine(CombineArgs args) {
  extern __shared__ float4 row4[];
  __shared__ float scratch[kCombineThreads / 32];
  if (static_cast<int>(blockIdx.x) >= *args.valid_rows) return;
  const int64_t row = blockIdx.x;
  const auto* const in =
      reinterpret_cast<const Bf16x8*>(args.expert_out + row * args.slots_per_token * args.hidden);
  const int columns = args.hidden / 8;
  CombineRow(args.residual + row * args.hidden, args.norm_weight, args.normed + row * args.hidden,
             args.hidden, args.eps, row4, scratch, [&](int i, float(&sum)[8]) {
               for (int j = 0; j < args.slots_per_token; ++j) AddTo(sum, in[int64_t{j} * columns + i]);
             });
}

}  // namespace

cudaError_t LaunchCombine(const CombineArgs& args, cudaStream_t stream) {
  if (args.rows == 0) return cudaSuccess;
  if (args.hidden % 8 != 0) return cudaErrorInvalidValue;
  Combine<<<args.rows, kCombineThreads, args.hidden * sizeof(float), stream>>>(args);
  return cudaGetLastError();
}

}  // namespace millrace::engine::cuda
