#include "engine/backend/cuda/device_model.h"

#include "engine/backend/cuda/kernels/grouped_gemm.h"
#include "engine/backend/cuda/kernels/router.h"
#include "engine/backend/cuda/memory.h"

namespace millrace::engine::cuda {
namespace {

DeviceLayer PlanLayer(const ModelShape& shape, bool moe, Layout& layout) {
  const auto hidden = static_cast<size_t>(shape.hidden);
  DeviceLayer layer;
  layer.moe = moe;
  layer.input_norm = layout.Place<float>(hidden);
  layer.post_norm = layout.Place<float>(hidden);
  layer.qkv = layout.Place<__nv_bfloat16>(static_cast<size_t>(shape.qkv_width()) * hidden);
  if (shape.qkv_bias) layer.qkv_bias = layout.Place<float>(static_cast<size_t>(shape.qkv_width()));
  layer.attention_out = layout.Place<__nv_bfloat16>(hidden * static_cast<size_t>(shape.q_width()));
  if (shape.dense_bias) layer.attention_out_bias = layout.Place<float>(hidden);
  if (shape.qk_norm) {
    layer.query_norm = layout.Place<float>(static_cast<size_t>(shape.head_dim));
    layer.key_norm = layout.Place<float>(static_cast<size_t>(shape.head_dim));
  }
  const auto width = static_cast<size_t>(moe ? shape.expert_width : shape.dense_width);
  const auto experts = static_cast<size_t>(moe ? shape.experts_all() : 1);
  if (moe && shape.fp8_experts) {
    const size_t blocks = width / kScaleBlock * (hidden / kScaleBlock);
    layer.gate_up_e4m3 = layout.Place<uint8_t>(experts * 2 * width * hidden);
    layer.down_e4m3 = layout.Place<uint8_t>(experts * width * hidden);
    layer.gate_up_scales = layout.Place<float>(experts * 2 * blocks);
    layer.down_scales = layout.Place<float>(experts * blocks);
  } else {
    layer.gate_up = layout.Place<__nv_bfloat16>(experts * 2 * width * hidden);
    layer.down = layout.Place<__nv_bfloat16>(experts * width * hidden);
  }
  if (!moe) return layer;
  const auto routed = static_cast<size_t>(shape.num_experts);
  layer.router = layout.Place<__nv_bfloat16>(routed * hidden);
  if (shape.router_low) layer.router_low = layout.Place<__nv_bfloat16>(routed * hidden);
  if (shape.expert_bias) layer.expert_bias = layout.Place<float>(routed);
  return layer;
}

}  // namespace

const char* ModelShape::Unsupported() const {
  if (hidden % 16 != 0) return "hidden_size must be a multiple of 16";
  if (head_dim != 128 && head_dim != 96 && head_dim != 64 && head_dim != 32) {
    return "head_dim must be 32, 64, 96 or 128";
  }
  if (heads % kv_heads != 0) return "num_attention_heads must be a multiple of num_key_value_heads";
  if (heads > 8 * kv_heads) return "more than 8 query heads per key-value head";
  if (rotary_pairs % 4 != 0) return "the rotary dimensions must be a multiple of 8";
  if (dense_layers > 0 && dense_width % 16 != 0) return "intermediate_size must be a multiple of 16";
  if (expert_width % 16 != 0) return "moe_intermediate_size must be a multiple of 16";
  if (vocab % 8 != 0) return "vocab_size must be a multiple of 8";
  if (num_experts % 8 != 0) return "num_experts must be a multiple of 8";
  if (experts_all() > kExpertsMax || experts_all() > kGroupedGemmExpertsMax)
    return "more experts than the routing kernel holds";
  if (top_k > kTopKMax || slots_per_token() > 32)
    return "more experts per token than the routing kernel holds";
  if (num_groups > kGroupsMax) return "more expert groups than the routing kernel holds";
  return nullptr;
}

size_t PlanModel(const ModelShape& shape, std::byte* base, DeviceModel* model) {
  Layout layout(base);
  const auto hidden = static_cast<size_t>(shape.hidden);
  const auto vocab = static_cast<size_t>(shape.vocab);
  *model = DeviceModel();
  model->shape = shape;
  model->embedding = layout.Place<__nv_bfloat16>(vocab * hidden);
  model->head = shape.tied_embeddings ? model->embedding : layout.Place<__nv_bfloat16>(vocab * hidden);
  model->final_norm = layout.Place<float>(hidden);
  model->rope = layout.Place<float>(static_cast<size_t>(shape.max_position) * 2 * shape.rotary_pairs);
  for (int32_t l = 0; l < shape.num_layers; ++l) {
    model->layers.push_back(PlanLayer(shape, l >= shape.dense_layers, layout));
  }
  if (shape.mtp) {
    model->mtp_projection = layout.Place<__nv_bfloat16>(2 * hidden * hidden);
    for (float** norm : {&model->mtp_embedding_norm, &model->mtp_hidden_norm, &model->mtp_final_norm}) {
      *norm = layout.Place<float>(hidden);
    }
    model->layers.push_back(PlanLayer(shape, true, layout));
  }
  return layout.bytes();
}

}  // namespace millrace::engine::cuda
