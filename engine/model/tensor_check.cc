#include <algorithm>
#include <optional>
#include <set>
#include <utility>

#include "absl/container/flat_hash_set.h"
#include "base/digest.h"
#include "base/random.h"
#include "engine/model/checkpoint.h"
#include "engine/model/fp8_scales.h"

namespace millrace::engine {
namespace {

constexpr std::string_view kLayerPrefix = "model.layers.";
constexpr std::string_view kMtpProjection = "eh_proj.weight";

// kMatrix: F32, F16, BF16, or F8_E4M3 with scales. kVector: F32, F16 or BF16. kRouterBias: F32 or BF16; with
// fewer bits than it was trained with, experts would be chosen differently, and fp16 cannot even hold its
// range safely.
enum class Kind { kMatrix, kVector, kRouterBias };

// "model.layers.12.mlp.gate.weight" -> 12 and "mlp.gate.weight"; nothing for other names.
struct LayerName {
  int32_t layer;
  std::string_view rest;
};
std::optional<LayerName> SplitLayerName(std::string_view name) {
  if (!name.starts_with(kLayerPrefix)) return std::nullopt;
  name.remove_prefix(kLayerPrefix.size());
  const size_t dot = name.find('.');
  if (dot == std::string_view::npos || dot == 0 || dot > 6) return std::nullopt;
  int32_t layer = 0;
  for (const char c : name.substr(0, dot)) {
    if (c < '0' || c > '9') return std::nullopt;
    layer = layer * 10 + (c - '0');
  }
  return LayerName{layer, name.substr(dot + 1)};
}

// Leftovers of training and of other exporters: known, and known to be without effect on inference.
bool IsIgnored(std::string_view name, const ModelConfig& config) {
  if (name.ends_with("inv_freq") || name.find("v_head") != std::string_view::npos) return true;
  const std::optional<LayerName> split = SplitLayerName(name);
  if (!split || config.num_mtp_layers == 0 || split->layer != config.num_layers) return false;
  return split->rest == "embed_tokens.weight" || split->rest == "shared_head.head.weight";
}

// Finds the MTP layer by its eh_proj. Its index is num_hidden_layers in one convention and num_hidden_layers
// - 1 (the count includes it) in another; either way the main layers are those below it.
Status FindMtpLayer(const Checkpoint& checkpoint, const std::vector<std::string>& names,
                    ModelConfig* config) {
  std::set<int32_t> owners;
  int32_t layer_last = -1;
  std::string name_last;
  for (const std::string& name : names) {
    const std::optional<LayerName> split = SplitLayerName(name);
    if (!split || IsIgnored(name, *config)) continue;
    if (split->rest == kMtpProjection) owners.insert(split->layer);
    if (split->layer > layer_last) {
      layer_last = split->layer;
      name_last = name;
    }
  }
  const int32_t configured = config->num_layers;
  config->num_mtp_layers = static_cast<int32_t>(owners.size());
  if (owners.size() > 1) {
    return Unimplemented("{}: layers {} and {} both have {}; one MTP layer is supported",
                         checkpoint.directory(), *owners.begin(), *owners.rbegin(), kMtpProjection);
  }
  if (owners.size() == 1) {
    const int32_t owner = *owners.begin();
    const std::string name = fmt::format("{}{}.{}", kLayerPrefix, owner, kMtpProjection);
    if (config->architecture != Architecture::kLingV2) {
      return Unimplemented("{}: tensor '{}': an MTP layer is only for BailingMoeV2", checkpoint.directory(),
                           name);
    }
    if (owner != configured && owner != configured - 1) {
      return InvalidArgument("{}: tensor '{}': is in layer {}, but num_hidden_layers is {}",
                             checkpoint.directory(), name, owner, configured);
    }
    if (owner == 0) {
      return InvalidArgument("{}: tensor '{}': leaves no main layer", checkpoint.directory(), name);
    }
    if (config->num_dense_layers > owner) {
      return InvalidArgument("{}: first_k_dense_replace: {} is more than the {} main layers below '{}'",
                             checkpoint.directory(), config->num_dense_layers, owner, name);
    }
    config->num_layers = owner;
  }
  if (layer_last >= config->num_kv_layers()) {
    return InvalidArgument(
        "{}: tensor '{}': is in layer {}, but num_hidden_layers is {} and the MTP layers are {}",
        checkpoint.directory(), name_last, layer_last, configured, config->num_mtp_layers);
  }
  return OkStatus();
}

class TensorChecker {
 public:
  TensorChecker(const Checkpoint& checkpoint, const ModelConfig& config)
      : checkpoint_(checkpoint), config_(config) {}

  Status CheckAll() {
    const int64_t h = config_.hidden_size;
    MR_RETURN_IF_ERROR(Check("model.word_embeddings.weight", {config_.vocab_size, h}, Kind::kMatrix));
    MR_RETURN_IF_ERROR(Check("model.norm.weight", {h}, Kind::kVector));
    if (!config_.tie_word_embeddings) {
      MR_RETURN_IF_ERROR(Check("lm_head.weight", {config_.vocab_size, h}, Kind::kMatrix));
    }
    for (int32_t layer = 0; layer < config_.num_kv_layers(); ++layer) {
      const std::string prefix = fmt::format("{}{}.", kLayerPrefix, layer);
      MR_RETURN_IF_ERROR(CheckAttention(prefix));
      MR_RETURN_IF_ERROR(config_.is_moe_layer(layer) ? CheckExperts(prefix)
                                                     : CheckMlp(prefix + "mlp.", config_.intermediate_size));
      if (layer >= config_.num_layers) MR_RETURN_IF_ERROR(CheckMtp(prefix));
    }
    return OkStatus();
  }

  bool used(const std::string& name) const { return used_.contains(name); }

 private:
  Status CheckAttention(const std::string& prefix) {
    const int64_t h = config_.hidden_size;
    const int64_t qkv = config_.q_size() + 2 * int64_t{config_.kv_size()};
    const std::string attention = prefix + "attention.";
    MR_RETURN_IF_ERROR(Check(prefix + "input_layernorm.weight", {h}, Kind::kVector));
    MR_RETURN_IF_ERROR(Check(prefix + "post_attention_layernorm.weight", {h}, Kind::kVector));
    MR_RETURN_IF_ERROR(Check(attention + "query_key_value.weight", {qkv, h}, Kind::kMatrix));
    MR_RETURN_IF_ERROR(Check(attention + "dense.weight", {h, config_.q_size()}, Kind::kMatrix));
    if (config_.qkv_bias) MR_RETURN_IF_ERROR(Check(attention + "query_key_value.bias", {qkv}, Kind::kVector));
    if (config_.dense_bias) MR_RETURN_IF_ERROR(Check(attention + "dense.bias", {h}, Kind::kVector));
    if (config_.use_qk_norm) {
      MR_RETURN_IF_ERROR(Check(attention + "query_layernorm.weight", {config_.head_dim}, Kind::kVector));
      MR_RETURN_IF_ERROR(Check(attention + "key_layernorm.weight", {config_.head_dim}, Kind::kVector));
    }
    return OkStatus();
  }

  Status CheckMlp(const std::string& prefix, int64_t width) {
    const int64_t h = config_.hidden_size;
    MR_RETURN_IF_ERROR(Check(prefix + "gate_proj.weight", {width, h}, Kind::kMatrix));
    MR_RETURN_IF_ERROR(Check(prefix + "up_proj.weight", {width, h}, Kind::kMatrix));
    return Check(prefix + "down_proj.weight", {h, width}, Kind::kMatrix);
  }

  Status CheckExperts(const std::string& prefix) {
    MR_RETURN_IF_ERROR(
        Check(prefix + "mlp.gate.weight", {config_.num_experts, config_.hidden_size}, Kind::kMatrix));
    if (config_.expert_bias) {
      MR_RETURN_IF_ERROR(Check(prefix + "mlp.gate.expert_bias", {config_.num_experts}, Kind::kRouterBias));
    }
    for (int32_t expert = 0; expert < config_.num_experts; ++expert) {
      MR_RETURN_IF_ERROR(
          CheckMlp(fmt::format("{}mlp.experts.{}.", prefix, expert), config_.moe_intermediate_size));
    }
    if (config_.shared_intermediate_size == 0) return OkStatus();
    return CheckMlp(prefix + "mlp.shared_experts.", config_.shared_intermediate_size);
  }

  Status CheckMtp(const std::string& prefix) {
    const int64_t h = config_.hidden_size;
    for (const char* norm : {"enorm.weight", "hnorm.weight", "final_layernorm.weight"}) {
      MR_RETURN_IF_ERROR(Check(prefix + norm, {h}, Kind::kVector));
    }
    return Check(fmt::format("{}{}", prefix, kMtpProjection), {h, 2 * h}, Kind::kMatrix);
  }

  Status Check(const std::string& name, const std::vector<int64_t>& shape, Kind kind) {
    const StatusOr<TensorView> tensor = checkpoint_.Tensor(name);
    if (!tensor.ok()) {
      return NotFound("{}: tensor '{}' is missing (its shape would be {})", checkpoint_.directory(), name,
                      ShapeText(shape));
    }
    if (tensor->shape != shape) {
      return InvalidArgument("{}: tensor '{}': has shape {}, but config.json calls for {}", tensor->file,
                             name, ShapeText(tensor->shape), ShapeText(shape));
    }
    used_.insert(name);
    return tensor->dtype == DType::kF8E4M3 && kind == Kind::kMatrix ? CheckFp8(*tensor)
                                                                    : CheckPlain(*tensor, kind);
  }

  Status CheckFp8(const TensorView& tensor) {
    if (config_.fp8_block != kFp8Block) {
      return InvalidArgument("{}: tensor '{}': is F8_E4M3 {}, but config.json has no quantization_config",
                             tensor.file, tensor.name, ShapeText(tensor.shape));
    }
    MR_ASSIGN_OR_RETURN(const TensorView scales, Fp8Scales(checkpoint_, tensor));
    used_.insert(scales.name);
    return OkStatus();
  }

  Status CheckPlain(const TensorView& tensor, Kind kind) {
    const bool usable = tensor.dtype == DType::kF32 || tensor.dtype == DType::kBf16 ||
                        (tensor.dtype == DType::kF16 && kind != Kind::kRouterBias);
    if (!usable) {
      return Unimplemented("{}: tensor '{}': {} {} is not supported here", tensor.file, tensor.name,
                           DTypeName(tensor.dtype), ShapeText(tensor.shape));
    }
    // Scales beside a tensor that is not quantised: one of the two is wrong, and guessing which would be
    // silent.
    if (kind == Kind::kMatrix && checkpoint_.Has(tensor.name + kFp8ScaleSuffix)) {
      return DataLoss("{}: tensor '{}': is {} {}, yet there are scales '{}{}'", tensor.file, tensor.name,
                      DTypeName(tensor.dtype), ShapeText(tensor.shape), tensor.name, kFp8ScaleSuffix);
    }
    return OkStatus();
  }

  const Checkpoint& checkpoint_;
  const ModelConfig& config_;
  absl::flat_hash_set<std::string> used_;
};

// XXH3 of up to four blocks of 4 KiB: the first, the last, and two whose place depends on the name and size
// alone.
uint64_t SampledHash(const TensorView& tensor) {
  constexpr size_t kBlock = 4096;
  const std::span<const std::byte> bytes = tensor.bytes;
  if (bytes.size() <= 4 * kBlock) return Xxh3(bytes);
  uint64_t hash = Xxh3(bytes.first(kBlock));
  hash = Xxh3(bytes.last(kBlock), hash);
  Random random(Xxh3(AsBytes(tensor.name), bytes.size()));
  for (int i = 0; i < 2; ++i) {
    hash = Xxh3(bytes.subspan(random.Below(bytes.size() - kBlock), kBlock), hash);
  }
  return hash;
}

// Every field that changes what the model computes or when it stops.
std::string ConfigText(const ModelConfig& c) {
  std::string text =
      fmt::format("{} {} {} {} {} {} {} {} {} {} {} {} {} {} {} {}", static_cast<int>(c.architecture),
                  c.hidden_size, c.num_layers, c.num_mtp_layers, c.num_heads, c.num_kv_heads, c.head_dim,
                  c.rotary_dim, c.intermediate_size, c.moe_intermediate_size, c.shared_intermediate_size,
                  c.num_experts, c.experts_per_token, c.num_dense_layers, c.num_groups, c.groups_per_token);
  text += fmt::format(" {} {} {} {} {} {} {} {} {}", c.sigmoid_router, c.expert_bias, c.norm_topk_prob,
                      c.routed_scaling_factor, c.use_qk_norm, c.norm_head, c.qkv_bias, c.dense_bias,
                      c.tie_word_embeddings);
  text +=
      fmt::format(" {} {} {} {} {}", c.rms_norm_eps, c.rope_theta, c.max_position, c.vocab_size, c.fp8_block);
  if (c.yarn) {
    text += fmt::format(" yarn {} {} {} {} {}", c.yarn->factor, c.yarn->original_max_position,
                        c.yarn->beta_fast, c.yarn->beta_slow, c.yarn->attention_factor);
  }
  if (c.linear_scaling) text += fmt::format(" linear {}", c.linear_scaling->factor);
  for (const int32_t id : c.eos_token_ids) text += fmt::format(" eos {}", id);
  return text;
}

}  // namespace

Status CheckTensors(const Checkpoint& checkpoint, ModelConfig* config, std::vector<std::string>* unused) {
  const std::vector<std::string> names = checkpoint.Names();
  ModelConfig checked = *config;
  MR_RETURN_IF_ERROR(FindMtpLayer(checkpoint, names, &checked));
  // The reference model always adds a bias that the checkpoint has, whatever the flag says.
  const int32_t first_moe = checked.num_dense_layers;
  if (checked.architecture == Architecture::kLingV2 &&
      checkpoint.Has(fmt::format("{}{}.mlp.gate.expert_bias", kLayerPrefix, first_moe))) {
    checked.expert_bias = true;
  }
  TensorChecker checker(checkpoint, checked);
  MR_RETURN_IF_ERROR(checker.CheckAll());
  unused->clear();
  for (const std::string& name : names) {
    if (!checker.used(name) && !IsIgnored(name, checked)) unused->push_back(name);
  }
  *config = checked;
  return OkStatus();
}

std::string ModelDigest(const Checkpoint& checkpoint, const ModelConfig& config) {
  std::string text = ConfigText(config);
  for (const std::string& name : checkpoint.Names()) {
    const StatusOr<TensorView> tensor = checkpoint.Tensor(name);
    text += fmt::format("\n{} {} {} {} {:016x}", name, DTypeName(tensor->dtype), ShapeText(tensor->shape),
                        tensor->bytes.size(), SampledHash(*tensor));
  }
  return Xxh3Hex(AsBytes(text));
}

}  // namespace millrace::engine
