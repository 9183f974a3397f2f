#pragma once
// Programmatic dependent launch: the launch may begin while the one before it in the stream still runs, so
// its CTAs are set up, and what does not depend on the step is on its way, when the one before ends. The
// kernel calls ptx::WaitForEarlierLaunches. Also in a captured graph.

#include <cuda_runtime.h>

namespace millrace::engine::cuda {

template <typename... Params, typename... Args>
cudaError_t LaunchOverlapped(void (*kernel)(Params...), dim3 grid, int threads, size_t shared_bytes,
                             cudaStream_t stream, const Args&... args) {
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = 1;
  return cudaLaunchKernelEx(&config, kernel, args...);
}

}  // namespace millrace::engine::cuda
