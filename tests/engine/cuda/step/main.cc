// Runs the tests of the step's kernels and of whole steps. `step_test [kernels|few|sampling|runner|error]`:
// only those. Exit code 0: all passed; 77: no GPU of compute capability 9.0 here, nothing was run.

#include <string>

#include "tests/engine/cuda/hot/support.h"
#include "tests/engine/cuda/step/tests.h"

int main(int argc, char** argv) {
  using namespace millrace::test;  // NOLINT: this is their main
  cudaDeviceProp properties;
  if (cudaGetDeviceProperties(&properties, 0) != cudaSuccess || properties.major != 9) {
    std::printf("SKIPPED: no GPU of compute capability 9.0\n");
    return 77;
  }
  const std::string only = argc > 1 ? argv[1] : "";
  if (only.empty() || only == "kernels") TestStepKernels();
  if (only.empty() || only == "few") TestFewRows();
  if (only.empty() || only == "sampling") TestSampling();
  if (only.empty() || only == "runner") TestStepRunner();
  if (only.empty() || only == "error") TestDeviceError();
  std::printf("%d checks, %d failed\n", checks, failures);
  return failures == 0 && checks > 0 ? 0 : 1;
}
