// Runs the tests of the attention and grouped GEMM kernels. `hot_kernels_test [gemm|attention]`: only those.
// Exit code 0: all passed; 77: no GPU of compute capability 9.0 here, nothing was run.

#include <string>

#include "tests/engine/cuda/hot/support.h"
#include "tests/engine/cuda/hot/tests.h"

int main(int argc, char** argv) {
  using namespace millrace::test;  // NOLINT: this is their main
  cudaDeviceProp properties;
  if (cudaGetDeviceProperties(&properties, 0) != cudaSuccess || properties.major != 9) {
    std::printf("SKIPPED: no GPU of compute capability 9.0\n");
    return 77;
  }
  const std::string only = argc > 1 ? argv[1] : "";
  if (only.empty() || only == "gemm") TestGroupedGemm();
  if (only.empty() || only == "attention") TestAttention();
  std::printf("%d checks, %d failed\n", checks, failures);
  return failures == 0 && checks > 0 ? 0 : 1;
}
