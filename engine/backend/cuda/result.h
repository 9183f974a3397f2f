#pragma once
// Errors of the CUDA parts that build without the rest of Millrace: a sentence, or nothing. cuda_backend.cc
// turns them into Status.

#include <cuda_runtime.h>

#include <string>
#include <utility>

namespace millrace::engine::cuda {

class [[nodiscard]] Result {
 public:
  Result() = default;  // success
  explicit Result(std::string message) : message_(std::move(message)) {}
  bool ok() const { return message_.empty(); }
  const std::string& message() const { return message_; }

 private:
  std::string message_;
};

inline Result CudaFailure(cudaError_t error, const char* what) {
  return Result("cuda: " + std::string(what) + ": " + cudaGetErrorName(error) + " (" +
                cudaGetErrorString(error) + ")");
}

}  // namespace millrace::engine::cuda

// Returns from the enclosing function when the call fails; the message names the call.
#define MR_CUDA(call)                                                                           \
  do {                                                                                          \
    const cudaError_t mr_cuda_ = (call);                                                        \
    if (mr_cuda_ != cudaSuccess) return ::millrace::engine::cuda::CudaFailure(mr_cuda_, #call); \
  } while (false)
#define MR_CUDA_TRY(expression)                                       \
  do {                                                                \
    ::millrace::engine::cuda::Result mr_result_value_ = (expression); \
    if (!mr_result_value_.ok()) return mr_result_value_;              \
  } while (false)
