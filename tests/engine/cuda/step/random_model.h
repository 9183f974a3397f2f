#pragma once
// A model of any shape whose weights are drawn on the device: for tests that compare the device with itself
// and for benchmarks of shapes whose checkpoints are not at hand.

#include <cstdint>

#include "engine/backend/cuda/device_model.h"
#include "engine/backend/cuda/memory.h"

namespace millrace::test {

struct RandomModel {
  engine::cuda::DeviceMemory memory;
  engine::cuda::DeviceModel model;
};

// Matrices have standard deviation 1 / sqrt(inputs), norms are near 1. Equal seeds give equal models.
engine::cuda::Result MakeRandomModel(const engine::cuda::ModelShape& shape, uint64_t seed,
                                     RandomModel* random);

// Ling-mini-2.0, cut to `layers` layers, and a small model with every feature of v2.
engine::cuda::ModelShape LingMiniShape(int32_t layers);
engine::cuda::ModelShape SmallShape();

}  // namespace millrace::test
