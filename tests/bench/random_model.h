#pragma once
// Models that exist only as a shape: configs of the Ling family and noise for weights.

#include <string>
#include <vector>

#include "engine/model/config.h"
#include "engine/model/tensor_source.h"

namespace millrace::engine {

// "ling-bench-s" (88 M parameters), "ling-mini-e64" (Ling-mini-2.0 with 64 experts, 4.7 B), "ling-mini-2.0"
// (16.3 B). `layers` > 0 keeps only that many.
StatusOr<ModelConfig> ShapeNamed(const std::string& name, int32_t layers);

// Every matrix is normal noise of standard deviation 1 / sqrt(columns), every vector is ones, so that
// activations stay near 1 and routing is spread over the experts. Rows are slices of one pool of numbers:
// fast, and enough for timing.
class RandomTensors : public TensorSource {
 public:
  explicit RandomTensors(uint64_t seed);
  StatusOr<DType> TypeOf(const std::string& name) const override;
  Status ReadRows(const std::string& name, int64_t row, int64_t rows, std::span<float> out) const override;
  void Forget(const std::string&, int64_t, int64_t) const override {}

 private:
  const uint64_t seed_;
  std::vector<float> pool_;
};

}  // namespace millrace::engine
