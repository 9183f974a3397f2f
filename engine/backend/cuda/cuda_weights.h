#pragma once
// A Ling model's weights on the GPU, in the form of device_model.h.

#include "engine/backend/cuda/cuda_backend.h"
#include "engine/backend/cuda/device_model.h"
#include "engine/backend/cuda/memory.h"

namespace millrace::engine {

// Unimplemented names what the kernels cannot do.
StatusOr<cuda::ModelShape> MakeModelShape(const ModelConfig& config);

// A Result of the device code as Status.
Status ToStatus(const cuda::Result& result);

class CudaWeights : public Weights {
 public:
  const ModelConfig& config() const override { return config_; }
  size_t bytes() const override { return memory_.bytes(); }

  ModelConfig config_;
  cuda::DeviceMemory memory_;  // every array of `model`
  cuda::DeviceModel model;
};

}  // namespace millrace::engine
