// For builds without the CUDA toolkit.
#include "engine/backend/cuda/cuda_backend.h"

namespace millrace::engine {

StatusOr<std::shared_ptr<const Weights>> LoadCudaWeights(const Checkpoint&, const ModelConfig&,
                                                         const CudaWeightsOptions&) {
  return Unavailable("this build has no CUDA: it was configured without nvcc");
}

StatusOr<std::unique_ptr<Backend>> MakeCudaBackend(std::shared_ptr<const Weights>,
                                                   const CudaBackendOptions&) {
  return Unavailable("this build has no CUDA: it was configured without nvcc");
}

}  // namespace millrace::engine
