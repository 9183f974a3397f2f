#pragma once
// A Ling model's weights on the device. Plain pointers into one allocation, laid out by PlanModel.

#include <cuda_bf16.h>

#include <cstddef>
#include <cstdint>
#include <vector>

namespace millrace::engine::cuda {

// The numbers of ModelConfig that the device code needs, with the shared MLP cut into experts of the routed
// width.
struct ModelShape {
  int32_t hidden = 0;
  int32_t num_layers = 0;  // main layers
  bool mtp = false;        // one more layer
  int32_t heads = 0;
  int32_t kv_heads = 0;
  int32_t head_dim = 0;
  int32_t rotary_pairs = 0;  // rotary_dim / 2
  int32_t dense_layers = 0;  // the first ones
  int32_t dense_width = 0;
  int32_t expert_width = 0;
  int32_t num_experts = 0;
  int32_t num_shared = 0;  // shared experts of expert_width
  int32_t top_k = 0;
  int32_t num_groups = 0;
  int32_t groups_per_token = 0;
  bool sigmoid_router = false;
  bool norm_topk_prob = true;
  float scaling = 1;
  bool expert_bias = false;
  bool qk_norm = false;
  bool qkv_bias = false;
  bool dense_bias = false;
  bool tied_embeddings = false;
  bool fp8_experts = false;  // the experts' weights are e4m3 with a scale per 128 x 128 block
  bool router_low = false;   // the router's weights need a second bf16 part
  float eps = 0;
  int32_t vocab = 0;
  int32_t max_position = 0;

  int32_t q_width() const { return heads * head_dim; }
  int32_t qkv_width() const { return (heads + 2 * kv_heads) * head_dim; }
  int32_t slots_per_token() const { return top_k + num_shared; }
  int32_t experts_all() const { return num_experts + num_shared; }
  // What the kernels ask of the sizes; null when all is well, else what is wrong.
  const char* Unsupported() const;
};

struct DeviceLayer {
  bool moe = false;
  float* input_norm = nullptr;             // [hidden]
  float* post_norm = nullptr;              // [hidden]
  __nv_bfloat16* qkv = nullptr;            // [qkv_width, hidden]
  float* qkv_bias = nullptr;               // [qkv_width], or null
  __nv_bfloat16* attention_out = nullptr;  // [hidden, q_width]
  float* attention_out_bias = nullptr;     // [hidden], or null
  float* query_norm = nullptr;             // [head_dim], or null
  float* key_norm = nullptr;               // [head_dim], or null
  // Dense layers: one FFN of dense_width. MoE layers: experts_all of expert_width, the shared ones last.
  __nv_bfloat16* gate_up = nullptr;  // [experts][2 * width][hidden]: row 2i = gate i, 2i+1 = up i
  __nv_bfloat16* down = nullptr;     // [experts][hidden][width]
  // MoE layers with fp8_experts have these instead.
  uint8_t* gate_up_e4m3 = nullptr;      // as gate_up
  uint8_t* down_e4m3 = nullptr;         // as down
  float* gate_up_scales = nullptr;      // [experts][gate, up][width / 128][hidden / 128]
  float* down_scales = nullptr;         // [experts][hidden / 128][width / 128]
  __nv_bfloat16* router = nullptr;      // [num_experts, hidden]
  __nv_bfloat16* router_low = nullptr;  // what bf16 leaves of the router's weights, or null
  float* expert_bias = nullptr;         // [num_experts], or null
};

struct DeviceModel {
  ModelShape shape;
  __nv_bfloat16* embedding = nullptr;       // [vocab, hidden]
  __nv_bfloat16* head = nullptr;            // [vocab, hidden]; the embedding itself when they are tied
  float* final_norm = nullptr;              // [hidden]
  float* rope = nullptr;                    // [max_position, 2 * rotary_pairs]: cos, then sin
  std::vector<DeviceLayer> layers;          // the MTP layer last
  __nv_bfloat16* mtp_projection = nullptr;  // [hidden, 2 * hidden]
  float* mtp_embedding_norm = nullptr;      // [hidden] each
  float* mtp_hidden_norm = nullptr;
  float* mtp_final_norm = nullptr;
};

// Places every array of a model of this shape at `base` (null: nowhere, to learn the size). Returns the
// bytes.
size_t PlanModel(const ModelShape& shape, std::byte* base, DeviceModel* model);

}  // namespace millrace::engine::cuda
