#include "tests/bench/random_model.h"

#include <algorithm>
#include <cmath>

#include "base/digest.h"
#include "base/random.h"

namespace millrace::engine {
namespace {

constexpr size_t kPool = size_t{1} << 22;

}  // namespace

StatusOr<ModelConfig> ShapeNamed(const std::string& name, int32_t layers) {
  ModelConfig c;
  c.use_qk_norm = true;
  c.sigmoid_router = true;
  c.expert_bias = true;
  c.routed_scaling_factor = 2.5f;
  c.num_dense_layers = 1;
  c.max_position = 32768;
  if (name == "ling-bench-s") {
    c.hidden_size = 512;
    c.num_layers = 8;
    c.num_heads = 8;
    c.num_kv_heads = 2;
    c.head_dim = 64;
    c.intermediate_size = 1536;
    c.moe_intermediate_size = c.shared_intermediate_size = 256;
    c.num_experts = 16;
    c.experts_per_token = 4;
    c.num_groups = 4;
    c.groups_per_token = 2;
    c.vocab_size = 32768;
  } else if (name == "ling-mini-2.0" || name == "ling-mini-e64") {
    c.hidden_size = 2048;
    c.num_layers = 20;
    c.num_heads = 16;
    c.num_kv_heads = 4;
    c.head_dim = 128;
    c.intermediate_size = 5120;
    c.moe_intermediate_size = c.shared_intermediate_size = 512;
    c.num_experts = name == "ling-mini-2.0" ? 256 : 64;
    c.experts_per_token = 8;
    c.num_groups = 8;
    c.groups_per_token = 4;
    c.vocab_size = 157184;
  } else {
    return InvalidArgument("shape '{}' is not one of ling-bench-s, ling-mini-e64, ling-mini-2.0", name);
  }
  c.rotary_dim = c.head_dim / 2;
  if (layers > 0) c.num_layers = layers;
  return c;
}

RandomTensors::RandomTensors(uint64_t seed) : seed_(seed), pool_(kPool) {
  Random random(seed);
  for (size_t i = 0; i < kPool; i += 2) {  // Box and Muller 1958
    const double radius = std::sqrt(-2 * std::log(1 - random.Uniform()));
    const double angle = 2 * M_PI * random.Uniform();
    pool_[i] = static_cast<float>(radius * std::cos(angle));
    pool_[i + 1] = static_cast<float>(radius * std::sin(angle));
  }
}

StatusOr<DType> RandomTensors::TypeOf(const std::string&) const { return DType::kBf16; }

Status RandomTensors::ReadRows(const std::string& name, int64_t row, int64_t rows,
                               std::span<float> out) const {
  if (name.find("norm") != std::string::npos) {
    std::fill(out.begin(), out.end(), 1.0f);
    return OkStatus();
  }
  const uint64_t tensor = Xxh3(AsBytes(name), seed_);
  if (name.ends_with("expert_bias")) {
    for (size_t i = 0; i < out.size(); ++i) out[i] = 0.01f * pool_[(tensor + i) % kPool];
    return OkStatus();
  }
  const auto cols = out.size() / static_cast<size_t>(rows);
  const float scale = 1.0f / std::sqrt(static_cast<float>(cols));
  for (int64_t r = 0; r < rows; ++r) {
    const size_t start = Mix64(tensor + static_cast<uint64_t>(row + r)) % (kPool - cols);
    for (size_t k = 0; k < cols; ++k) out[static_cast<size_t>(r) * cols + k] = pool_[start + k] * scale;
  }
  return OkStatus();
}

}  // namespace millrace::engine
