#include <cmath>
#include <vector>

#include "tests/engine/cuda/step/bench.h"
#include "tests/engine/cuda/step/random_model.h"

namespace millrace::test {
namespace {

using engine::cuda::DeviceLayer;
using engine::cuda::DeviceModel;
using engine::cuda::ModelShape;
using engine::cuda::Result;

__device__ uint64_t Mix(uint64_t x) {
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ull;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebull;
  return x ^ (x >> 31);
}

// Uniform with the wanted mean and deviation.
__device__ float Draw(uint64_t seed, int64_t i, float mean, float deviation) {
  const uint64_t bits = Mix(seed + 0x9e3779b97f4a7c15ull * static_cast<uint64_t>(i + 1));
  return mean + deviation * 3.4641016f * (static_cast<float>(bits >> 40) * 0x1p-24f - 0.5f);
}

template <typename T>
__global__ void Fill(T* out, int64_t count, uint64_t seed, float mean, float deviation) {
  for (int64_t i = blockIdx.x * int64_t{blockDim.x} + threadIdx.x; i < count;
       i += int64_t{gridDim.x} * blockDim.x) {
    out[i] = static_cast<T>(Draw(seed, i, mean, deviation));
  }
}

// Codes of e4m3 without its NaN; a scale of 1 / (60 sqrt(inputs)) gives them about the deviation of the bf16
// weights.
__global__ void FillCodes(uint8_t* out, int64_t count, uint64_t seed) {
  for (int64_t i = blockIdx.x * int64_t{blockDim.x} + threadIdx.x; i < count;
       i += int64_t{gridDim.x} * blockDim.x) {
    const auto code =
        static_cast<uint8_t>(Mix(seed + 0x9e3779b97f4a7c15ull * static_cast<uint64_t>(i + 1)) >> 56);
    out[i] = (code & 0x7f) == 0x7f ? 0 : code;
  }
}

class Filler {
 public:
  explicit Filler(uint64_t seed) : seed_(seed) {}
  void Matrix(__nv_bfloat16* out, int64_t rows, int64_t cols, float deviation = 0) {
    if (deviation == 0) deviation = 1 / std::sqrt(static_cast<float>(cols));
    if (out != nullptr) Fill<<<1024, 256>>>(out, rows * cols, seed_ += 77, 0.0f, deviation);
  }
  void Codes(uint8_t* out, float* scales, int64_t rows, int64_t cols) {
    if (out == nullptr) return;
    FillCodes<<<1024, 256>>>(out, rows * cols, seed_ += 77);
    Vector(scales, rows * cols / (128 * 128), 1 / (60 * std::sqrt(static_cast<float>(cols))), 0);
  }
  void Vector(float* out, int64_t size, float mean, float deviation) {
    if (out != nullptr) Fill<<<64, 256>>>(out, size, seed_ += 77, mean, deviation);
  }

 private:
  uint64_t seed_;
};

void FillLayer(const ModelShape& s, const DeviceLayer& layer, Filler& fill) {
  fill.Vector(layer.input_norm, s.hidden, 1, 0.1f);
  fill.Vector(layer.post_norm, s.hidden, 1, 0.1f);
  fill.Matrix(layer.qkv, s.qkv_width(), s.hidden);
  fill.Vector(layer.qkv_bias, s.qkv_width(), 0, 0.1f);
  fill.Matrix(layer.attention_out, s.hidden, s.q_width());
  fill.Vector(layer.attention_out_bias, s.hidden, 0, 0.1f);
  fill.Vector(layer.query_norm, s.head_dim, 1, 0.1f);
  fill.Vector(layer.key_norm, s.head_dim, 1, 0.1f);
  const int64_t width = layer.moe ? s.expert_width : s.dense_width;
  const int64_t experts = layer.moe ? s.experts_all() : 1;
  fill.Matrix(layer.gate_up, experts * 2 * width, s.hidden);
  fill.Matrix(layer.down, experts * s.hidden, width);
  fill.Codes(layer.gate_up_e4m3, layer.gate_up_scales, experts * 2 * width, s.hidden);
  fill.Codes(layer.down_e4m3, layer.down_scales, experts * s.hidden, width);
  fill.Matrix(layer.router, s.num_experts, s.hidden);
  fill.Vector(layer.expert_bias, s.num_experts, 0, 0.05f);
}

}  // namespace

void FillRandom(__nv_bfloat16* out, size_t count, uint64_t seed) {
  Fill<<<2048, 256>>>(out, static_cast<int64_t>(count), seed, 0.0f, 0.3f);
}
void FillRandom(float* out, size_t count, uint64_t seed) {
  Fill<<<2048, 256>>>(out, static_cast<int64_t>(count), seed, 0.0f, 0.3f);
}

Result MakeRandomModel(const ModelShape& shape, uint64_t seed, RandomModel* random) {
  const size_t bytes = engine::cuda::PlanModel(shape, nullptr, &random->model);
  MR_CUDA_TRY(engine::cuda::DeviceMemory::Allocate(bytes, "random weights", &random->memory));
  engine::cuda::PlanModel(shape, random->memory.data(), &random->model);
  const DeviceModel& model = random->model;
  Filler fill(seed);
  fill.Matrix(model.embedding, shape.vocab, shape.hidden, 1);
  fill.Matrix(model.head, shape.vocab, shape.hidden);
  fill.Vector(model.final_norm, shape.hidden, 1, 0.1f);
  for (const DeviceLayer& layer : model.layers) FillLayer(shape, layer, fill);
  fill.Matrix(model.mtp_projection, shape.hidden, 2 * shape.hidden);
  for (float* norm : {model.mtp_embedding_norm, model.mtp_hidden_norm, model.mtp_final_norm}) {
    fill.Vector(norm, shape.hidden, 1, 0.1f);
  }
  std::vector<float> rope(static_cast<size_t>(shape.max_position) * 2 * shape.rotary_pairs);
  for (int64_t p = 0; p < shape.max_position; ++p) {
    for (int i = 0; i < shape.rotary_pairs; ++i) {
      const double angle = static_cast<double>(p) * std::pow(600000.0, -1.0 * i / shape.rotary_pairs);
      rope[2 * p * shape.rotary_pairs + i] = static_cast<float>(std::cos(angle));
      rope[(2 * p + 1) * shape.rotary_pairs + i] = static_cast<float>(std::sin(angle));
    }
  }
  MR_CUDA(cudaMemcpy(model.rope, rope.data(), rope.size() * sizeof(float), cudaMemcpyHostToDevice));
  MR_CUDA(cudaDeviceSynchronize());
  return Result();
}

ModelShape LingMiniShape(int32_t layers) {
  ModelShape s;
  s.hidden = 2048;
  s.num_layers = layers;
  s.heads = 16;
  s.kv_heads = 4;
  s.head_dim = 128;
  s.rotary_pairs = 32;
  s.dense_layers = 1;
  s.dense_width = 5120;
  s.expert_width = 512;
  s.num_experts = 256;
  s.num_shared = 1;
  s.top_k = 8;
  s.num_groups = 8;
  s.groups_per_token = 4;
  s.sigmoid_router = true;
  s.scaling = 2.5f;
  s.expert_bias = true;
  s.qk_norm = true;
  s.eps = 1e-6f;
  s.vocab = 157184;
  s.max_position = 32768;
  return s;
}

ModelShape SmallShape() {
  ModelShape s = LingMiniShape(3);
  s.hidden = 128;
  s.mtp = true;
  s.heads = 4;
  s.kv_heads = 2;
  s.head_dim = 32;
  s.rotary_pairs = 8;
  s.dense_width = 160;
  s.expert_width = 48;
  s.num_experts = 32;
  s.top_k = 4;
  s.num_groups = 4;
  s.groups_per_token = 2;
  s.vocab = 512;
  s.max_position = 1024;
  return s;
}

}  // namespace millrace::test
