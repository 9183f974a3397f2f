#pragma once
// A Ling model's weights as the CPU kernels want them.

#include <vector>

#include "engine/backend/cpu/cpu_backend.h"
#include "engine/backend/cpu/kernels.h"
#include "engine/backend/cpu/memory.h"

namespace millrace::engine {

struct FfnWeights {
  int32_t width = 0;     // inner columns; 0 = there is none
  PackedMatrix gate_up;  // [2 * strips of width, hidden]: a strip of gate, a strip of up, ...
  PackedMatrix down;     // [hidden, width]
};

struct LayerWeights {
  std::vector<float> input_norm;  // [hidden]
  std::vector<float> post_norm;   // [hidden]
  PackedMatrix qkv;               // [(heads + 2 kv heads) * head_dim, hidden]
  std::vector<float> qkv_bias;    // or empty
  PackedMatrix dense;             // [hidden, heads * head_dim]
  std::vector<float> dense_bias;  // or empty
  std::vector<float> query_norm;  // [head_dim], or empty
  std::vector<float> key_norm;    // [head_dim], or empty
  bool moe = false;
  FfnWeights ffn;                   // dense layers; MoE layers: the shared expert
  PackedMatrix router;              // [experts, hidden], never quantised: bf16 if stored so, else fp32
  std::vector<float> expert_bias;   // [experts], or empty
  std::vector<FfnWeights> experts;  // [experts]; width 0 where another rank has it
};

struct MtpWeights {
  std::vector<float> embedding_norm;  // [hidden]
  std::vector<float> hidden_norm;     // [hidden]
  PackedMatrix projection;            // [hidden, 2 * hidden]: embedding first, hidden second
  std::vector<float> final_norm;      // [hidden]
  LayerWeights layer;
};

class CpuWeights : public Weights {
 public:
  const ModelConfig& config() const override { return config_; }
  size_t bytes() const override { return memory_.bytes().size(); }

  ModelConfig config_;
  Precision precision_ = Precision::kBfloat16;
  WeightFormat format_ = WeightFormat::kBf16;  // of every matrix but the router, and the head beside int4
  HugeMemory memory_;                          // every matrix below points into it
  const void* embedding = nullptr;             // [vocab, hidden] bf16 or fp32, not packed
  PackedMatrix head;                           // [vocab, hidden], int8 beside int4; norm_head already applied
  std::vector<float> final_norm;               // [hidden]
  std::vector<LayerWeights> layers;
  std::vector<MtpWeights> mtp;  // none or one
};

// Bytes of one routed expert, gate_up then down.
size_t ExpertBytes(const ModelConfig& config, WeightFormat format);
// Reads and packs one routed expert of a layer, as tensors are numbered, into `memory` of ExpertBytes.
// Calling thread.
StatusOr<FfnWeights> LoadExpert(const TensorSource& source, const CpuWeights& weights, int32_t layer,
                                int32_t expert, std::span<std::byte> memory);

}  // namespace millrace::engine
