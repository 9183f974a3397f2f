#pragma once
// cuBLASLt, opened when a GPU is first used: the binary starts on machines without it, and its thread-local
// storage (94 KB in every thread, more than small thread stacks hold) is not paid for by processes that
// compute on the CPU.

#include <cublasLt.h>

#include <string>

namespace millrace::engine::cuda {

// The functions that gemm.cc uses, under the names of the library without their prefix.
struct CublasLt {
  decltype(&cublasLtCreate) Create = nullptr;
  decltype(&cublasLtDestroy) Destroy = nullptr;
  decltype(&cublasLtGetStatusString) GetStatusString = nullptr;
  decltype(&cublasLtMatmulDescCreate) MatmulDescCreate = nullptr;
  decltype(&cublasLtMatmulDescDestroy) MatmulDescDestroy = nullptr;
  decltype(&cublasLtMatmulDescSetAttribute) MatmulDescSetAttribute = nullptr;
  decltype(&cublasLtMatrixLayoutCreate) MatrixLayoutCreate = nullptr;
  decltype(&cublasLtMatrixLayoutDestroy) MatrixLayoutDestroy = nullptr;
  decltype(&cublasLtMatmulPreferenceCreate) MatmulPreferenceCreate = nullptr;
  decltype(&cublasLtMatmulPreferenceDestroy) MatmulPreferenceDestroy = nullptr;
  decltype(&cublasLtMatmulPreferenceSetAttribute) MatmulPreferenceSetAttribute = nullptr;
  decltype(&cublasLtMatmulAlgoGetHeuristic) MatmulAlgoGetHeuristic = nullptr;
  decltype(&cublasLtMatmul) Matmul = nullptr;
};

// Opened once, for the life of the process. Null when it cannot be had; `why` then says so. Any thread.
const CublasLt* OpenCublasLt(std::string* why);

}  // namespace millrace::engine::cuda
