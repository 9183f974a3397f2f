#pragma once
// The header of one safetensors file: where each tensor's bytes lie.

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "base/status.h"
#include "engine/model/checkpoint.h"

namespace millrace::engine {

inline constexpr uint64_t kSafetensorsHeaderBytesMax = uint64_t{100} << 20;

struct SafetensorsEntry {
  std::string name;
  DType dtype = DType::kOther;
  std::vector<int64_t> shape;
  uint64_t begin = 0;  // in the data section
  uint64_t end = 0;
};

// Parses the JSON of a header whose data section is `data_bytes` long. Every entry returned lies inside it,
// shares no byte with another, and has as many bytes as its shape and dtype call for. DataLoss names the
// tensor. Pure.
StatusOr<std::vector<SafetensorsEntry>> ParseSafetensorsHeader(std::string_view header, uint64_t data_bytes);

}  // namespace millrace::engine
