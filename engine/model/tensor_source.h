#pragma once
// Where a backend's loader reads tensors from: a checkpoint, or random numbers in a benchmark.

#include <cstdint>
#include <span>
#include <string>

#include "base/status.h"

namespace millrace::engine {

enum class DType { kF32, kF16, kBf16, kF8E4M3, kI64, kI32, kOther };

// Any thread.
class TensorSource {
 public:
  virtual ~TensorSource() = default;
  virtual StatusOr<DType> TypeOf(const std::string& name) const = 0;
  // Converts `rows` rows of a 2-D tensor (or a 1-D tensor as one row) to float32, starting at `row`.
  virtual Status ReadRows(const std::string& name, int64_t row, int64_t rows, std::span<float> out) const = 0;
  // These rows were read and will not be again: their bytes may leave this process's memory.
  virtual void Forget(const std::string& name, int64_t row, int64_t rows) const = 0;
};

}  // namespace millrace::engine
