#pragma once
// Dense matrix products through cuBLASLt: bf16 operands, fp32 accumulation.

#include <cuda_bf16.h>

#include <cstdint>
#include <map>
#include <memory>
#include <tuple>

#include "engine/backend/cuda/cublas_lt.h"
#include "engine/backend/cuda/memory.h"
#include "engine/backend/cuda/result.h"

namespace millrace::engine::cuda {

// out[r] = weights x[r] (+ out[r] when `accumulate`). Row-major throughout. 16-byte aligned pointers; n and k
// multiples of 8.
struct GemmArgs {
  const __nv_bfloat16* weights = nullptr;  // [n, k], as checkpoints store it
  const __nv_bfloat16* x = nullptr;        // [rows, k]
  void* out = nullptr;                     // [rows, n]
  bool out_float = false;                  // fp32, else bf16
  bool accumulate = false;
  int32_t rows = 0;
  int32_t n = 0;
  int32_t k = 0;
};

// Chooses an algorithm once per shape, the same on every start, and keeps it; the workspace is taken at
// creation, so a known shape runs inside a graph capture and allocates nothing. One thread and one stream at
// a time.
class Gemm {
 public:
  static Result Create(std::unique_ptr<Gemm>* gemm);
  ~Gemm();
  Result Run(const GemmArgs& args, cudaStream_t stream);

 private:
  struct Plan;
  using Shape = std::tuple<int32_t, int32_t, int32_t, bool, bool>;  // rows, n, k, out_float, accumulate
  Gemm() = default;
  Result MakePlan(const GemmArgs& args, Plan* plan);

  const CublasLt* blas_ = nullptr;
  cublasLtHandle_t handle_ = nullptr;
  DeviceMemory workspace_;
  std::map<Shape, std::unique_ptr<Plan>> plans_;
};

}  // namespace millrace::engine::cuda
