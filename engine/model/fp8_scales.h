#pragma once
// Block-FP8 tensors and the scales that go with them.

#include <cstdint>
#include <string>
#include <vector>

#include "base/status.h"
#include "engine/model/checkpoint.h"

namespace millrace::engine {

inline constexpr int64_t kFp8Block =
    128;  // a scale covers 128 x 128 elements; the last row and column are ragged
inline constexpr const char* kFp8ScaleSuffix = "_scale_inv";

// The scales of `tensor`, an F8_E4M3 matrix [out, in]: F32 [ceil(out/128), ceil(in/128)]; element (i, j) is
// multiplied by (i/128, j/128). DataLoss names both tensors when the scales are missing or of another shape
// or dtype.
StatusOr<TensorView> Fp8Scales(const Checkpoint& checkpoint, const TensorView& tensor);

// "[256, 64]", for messages.
std::string ShapeText(const std::vector<int64_t>& shape);

}  // namespace millrace::engine
