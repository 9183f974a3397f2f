#pragma once
// config.json of a Ling checkpoint, validated. Everything after this file trusts these numbers.

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "base/status.h"

namespace millrace::engine {

enum class Architecture { kLingV1, kLingV2 };  // BailingMoeForCausalLM, BailingMoeV2ForCausalLM

struct YarnScaling {
  double factor = 1;
  int32_t original_max_position = 0;
  double beta_fast = 32;
  double beta_slow = 1;
  double attention_factor = 1;  // multiplies cos and sin; already resolved from mscale / attention_factor
};

struct LinearScaling {
  double factor = 1;  // positions are divided by it
};

struct ModelConfig {
  Architecture architecture = Architecture::kLingV2;
  int32_t hidden_size = 0;
  int32_t num_layers = 0;      // main layers, without the MTP layer
  int32_t num_mtp_layers = 0;  // 0 or 1; final after CheckTensors found (or missed) eh_proj
  int32_t num_heads = 0;
  int32_t num_kv_heads = 0;
  int32_t head_dim = 0;
  int32_t rotary_dim = 0;             // even, <= head_dim
  int32_t intermediate_size = 0;      // dense FFN
  int32_t moe_intermediate_size = 0;  // per routed expert
  int32_t shared_intermediate_size =
      0;  // the fused shared MLP: num_shared_experts * per-shared size; 0 = none
  int32_t num_experts = 0;
  int32_t experts_per_token = 0;
  int32_t num_dense_layers = 0;  // first_k_dense_replace
  int32_t num_groups = 0;        // 0 = no group limit
  int32_t groups_per_token = 0;
  bool sigmoid_router = false;  // v2; v1: softmax
  bool expert_bias = false;
  bool norm_topk_prob = true;
  float routed_scaling_factor = 1;
  bool use_qk_norm = false;
  bool norm_head = false;
  bool qkv_bias = false;    // attention.query_key_value.bias exists
  bool dense_bias = false;  // attention.dense.bias exists
  bool tie_word_embeddings = false;
  float rms_norm_eps = 1e-6f;
  double rope_theta = 600000;
  std::optional<YarnScaling> yarn;
  std::optional<LinearScaling> linear_scaling;
  int32_t max_position = 0;  // context limit in tokens, YaRN counted
  int32_t vocab_size = 0;
  int32_t fp8_block = 0;               // 128 for block-FP8 checkpoints, 0 otherwise
  std::vector<int32_t> eos_token_ids;  // from generation_config.json when there, else config.json
  // generation_config.json's sampling defaults; shown to the operator, never applied silently.
  std::string generation_defaults;

  int32_t q_size() const { return num_heads * head_dim; }
  int32_t kv_size() const { return num_kv_heads * head_dim; }
  // Layers that own KV: the main ones, then the MTP layer when there is one.
  int32_t num_kv_layers() const { return num_layers + num_mtp_layers; }
  bool is_moe_layer(int32_t layer) const { return layer >= num_dense_layers; }  // the MTP layer always is
};

// Parses the text of config.json. InvalidArgument / Unimplemented name the field ("num_attention_heads:
// ...").
StatusOr<ModelConfig> ParseModelConfig(std::string_view config_json);

// Reads <directory>/config.json and generation_config.json if present. Errors name the file.
StatusOr<ModelConfig> LoadModelConfig(const std::string& directory);

}  // namespace millrace::engine
