#include "engine/model/config.h"

#include <algorithm>
#include <cmath>
#include <initializer_list>
#include <string>
#include <utility>

#include "base/file.h"
#include "base/json.h"

namespace millrace::engine {
namespace {

// Far above any Ling, far below what would overflow 32 bits in a product of two of them with the types used
// here.
constexpr int64_t kHiddenMax = int64_t{1} << 17;
constexpr int64_t kLayersMax = 1024;
constexpr int64_t kHeadsMax = 4096;
constexpr int64_t kHeadDimMax = 1024;
constexpr int64_t kProjectionMax = int64_t{1} << 20;  // heads * head_dim, and every FFN width
constexpr int64_t kExpertsMax = 4096;
constexpr int64_t kSharedExpertsMax = 64;
constexpr int64_t kVocabMax = int64_t{1} << 24;
constexpr int64_t kPositionMax = int64_t{1} << 26;
constexpr double kRopeFactorMax = 4096;
constexpr size_t kConfigBytesMax = size_t{16} << 20;

// Reads fields of one JSON object and remembers the first error, which starts with the field's path. After an
// error every read gives a harmless value, so that a caller may look at status() once at the end of a group.
class FieldReader {
 public:
  explicit FieldReader(const Json& object, std::string prefix = "")
      : object_(object), prefix_(std::move(prefix)) {}

  const Status& status() const { return status_; }
  bool Has(const std::string& key) const {
    const auto found = object_.find(key);
    return found != object_.end() && !found->is_null();
  }
  const Json& At(const std::string& key) const { return *object_.find(key); }

  std::optional<int64_t> Int(const std::string& key, int64_t min, int64_t max) {
    const std::optional<int64_t> value = Take(key, GetInt(object_, key));
    if (value && (*value < min || *value > max)) {
      Fail(InvalidArgument("{}{}: {} is not between {} and {}", prefix_, key, *value, min, max));
      return std::nullopt;
    }
    return value;
  }

  // The value under whichever of two names is there; both may be there if they agree.
  std::optional<int64_t> Int(const std::string& key, const std::string& alias, int64_t min, int64_t max) {
    const std::optional<int64_t> first = Int(key, min, max);
    const std::optional<int64_t> second = Int(alias, min, max);
    if (first && second && *first != *second) {
      Fail(InvalidArgument("{}{}: {} contradicts {}: {}", prefix_, key, *first, alias, *second));
    }
    return first ? first : second;
  }

  int32_t Need(const std::string& key, std::optional<int64_t> value) {
    if (!value) Fail(InvalidArgument("{}{}: missing", prefix_, key));
    return static_cast<int32_t>(value.value_or(1));
  }
  int32_t NeedInt(const std::string& key, int64_t min, int64_t max) { return Need(key, Int(key, min, max)); }

  // min < value <= max, unless `closed`: then min <= value.
  std::optional<double> Number(const std::string& key, double min, double max, bool closed = false) {
    const std::optional<double> value = Take(key, GetNumber(object_, key));
    if (!value) return value;
    const bool low = closed ? *value < min : *value <= min;
    if (!std::isfinite(*value) || low || *value > max) {
      Fail(InvalidArgument("{}{}: {} is not {} {} and at most {}", prefix_, key, *value,
                           closed ? "at least" : "above", min, max));
      return std::nullopt;
    }
    return value;
  }
  double NeedNumber(const std::string& key, double min, double max) {
    const std::optional<double> value = Number(key, min, max);
    if (!value) Fail(InvalidArgument("{}{}: missing", prefix_, key));
    return value.value_or(1);
  }

  bool Bool(const std::string& key, bool absent) { return Take(key, GetBool(object_, key)).value_or(absent); }
  std::optional<std::string> Text(const std::string& key) { return Take(key, GetString(object_, key)); }

  void Fail(const Status& status) {
    if (status_.ok()) status_ = status;
  }

 private:
  template <typename T>
  std::optional<T> Take(const std::string& key, const StatusOr<std::optional<T>>& value) {
    if (value.ok()) return *value;
    std::string_view message = Message(value.status());
    const std::string quoted = fmt::format("'{}' ", key);
    if (message.starts_with(quoted)) message.remove_prefix(quoted.size());
    Fail(InvalidArgument("{}{}: {}", prefix_, key, message));
    return std::nullopt;
  }

  const Json& object_;  // outlives this
  const std::string prefix_;
  Status status_;
};

StatusOr<Architecture> ReadArchitecture(const Json& json) {
  FieldReader fields(json);
  if (!fields.Has("architectures")) {
    const std::optional<std::string> score = fields.Text("score_function");
    MR_RETURN_IF_ERROR(fields.status());
    return score == "sigmoid" || fields.Has("n_group") ? Architecture::kLingV2 : Architecture::kLingV1;
  }
  const Json& list = fields.At("architectures");
  if (!list.is_array() || list.empty() || !list[0].is_string()) {
    return InvalidArgument("architectures: must be a list of names");
  }
  const std::string name = list[0].get<std::string>();
  if (name == "BailingMoeForCausalLM") return Architecture::kLingV1;
  if (name == "BailingMoeV2ForCausalLM") return Architecture::kLingV2;
  return Unimplemented(
      "architectures: '{}' is not supported (BailingMoeForCausalLM and BailingMoeV2ForCausalLM are)", name);
}

Status ReadAttention(FieldReader& fields, ModelConfig* config) {
  config->hidden_size = fields.NeedInt("hidden_size", 1, kHiddenMax);
  config->num_layers = fields.NeedInt("num_hidden_layers", 1, kLayersMax);
  config->num_heads = fields.NeedInt("num_attention_heads", 1, kHeadsMax);
  config->num_kv_heads =
      static_cast<int32_t>(fields.Int("num_key_value_heads", 1, kHeadsMax).value_or(config->num_heads));
  const std::optional<int64_t> head_dim = fields.Int("head_dim", 2, kHeadDimMax);
  MR_RETURN_IF_ERROR(fields.status());
  if (config->num_heads % config->num_kv_heads != 0) {
    return InvalidArgument("num_key_value_heads: {} does not divide num_attention_heads: {}",
                           config->num_kv_heads, config->num_heads);
  }
  if (!head_dim && config->hidden_size % config->num_heads != 0) {
    return InvalidArgument("head_dim: missing, and num_attention_heads: {} does not divide hidden_size: {}",
                           config->num_heads, config->hidden_size);
  }
  const int64_t dim = head_dim.value_or(config->hidden_size / config->num_heads);
  if (dim > kHeadDimMax || dim * config->num_heads > kProjectionMax) {
    return InvalidArgument("head_dim: {} for {} heads is too large", dim, config->num_heads);
  }
  config->head_dim = static_cast<int32_t>(dim);

  const bool is_v2 = config->architecture == Architecture::kLingV2;
  config->use_qk_norm = fields.Bool("use_qk_norm", is_v2);
  if (config->use_qk_norm && !is_v2) fields.Fail(Unimplemented("use_qk_norm: true is only for BailingMoeV2"));
  config->qkv_bias = fields.Bool("use_qkv_bias", false);
  config->dense_bias = fields.Bool("use_bias", false);
  if (fields.Bool("use_sliding_window", false)) {
    fields.Fail(Unimplemented("use_sliding_window: true is not supported"));
  }
  const double eps = fields.NeedNumber("rms_norm_eps", 0, 0.1);
  config->rms_norm_eps = static_cast<float>(eps);
  return fields.status();
}

Status ReadExperts(FieldReader& fields, ModelConfig* config) {
  config->num_dense_layers =
      static_cast<int32_t>(fields.Int("first_k_dense_replace", 0, config->num_layers).value_or(0));
  const std::optional<int64_t> dense = fields.Int("intermediate_size", 1, kProjectionMax);
  config->intermediate_size = config->num_dense_layers > 0 ? fields.Need("intermediate_size", dense)
                                                           : static_cast<int32_t>(dense.value_or(0));
  config->moe_intermediate_size = fields.NeedInt("moe_intermediate_size", 1, kProjectionMax);
  config->num_experts =
      fields.Need("num_experts", fields.Int("num_experts", "n_routed_experts", 1, kExpertsMax));
  config->experts_per_token = fields.NeedInt("num_experts_per_tok", 1, kExpertsMax);
  const int64_t shared = fields.Need(
      "num_shared_experts", fields.Int("num_shared_experts", "n_shared_experts", 0, kSharedExpertsMax));
  const int64_t shared_size = fields.Int("moe_shared_expert_intermediate_size", 1, kProjectionMax)
                                  .value_or(config->moe_intermediate_size);
  if (shared * shared_size > kProjectionMax) {
    fields.Fail(InvalidArgument("num_shared_experts: {} of {} channels are too large", shared, shared_size));
  }
  config->shared_intermediate_size = static_cast<int32_t>(shared * shared_size);
  MR_RETURN_IF_ERROR(fields.status());
  if (config->experts_per_token > config->num_experts) {
    return InvalidArgument("num_experts_per_tok: {} is more than num_experts: {}", config->experts_per_token,
                           config->num_experts);
  }
  return OkStatus();
}

Status ReadGroups(FieldReader& fields, ModelConfig* config) {
  const auto groups = static_cast<int32_t>(fields.Int("n_group", 0, kExpertsMax).value_or(0));
  if (groups == 0) return fields.status();
  const int32_t kept = fields.NeedInt("topk_group", 1, groups);
  MR_RETURN_IF_ERROR(fields.status());
  if (config->architecture == Architecture::kLingV1) {
    if (groups > 1) return Unimplemented("n_group: {} is only for BailingMoeV2", groups);
    return OkStatus();
  }
  if (config->num_experts % groups != 0) {
    return InvalidArgument("n_group: {} does not divide num_experts: {}", groups, config->num_experts);
  }
  const int32_t group_size = config->num_experts / groups;
  if (groups > 1 && group_size < 2) {
    return InvalidArgument("n_group: {} leaves one expert to a group, but groups are scored by two", groups);
  }
  if (config->experts_per_token > kept * group_size) {
    return InvalidArgument("num_experts_per_tok: {} is more than the {} experts of topk_group: {} groups",
                           config->experts_per_token, kept * group_size, kept);
  }
  config->num_groups = groups;
  config->groups_per_token = kept;
  return OkStatus();
}

Status ReadRouter(FieldReader& fields, ModelConfig* config) {
  const bool is_v2 = config->architecture == Architecture::kLingV2;
  const std::string expected = is_v2 ? "sigmoid" : "softmax";
  if (const auto score = fields.Text("score_function"); score && *score != expected) {
    fields.Fail(Unimplemented("score_function: '{}' is not supported with this architecture ('{}' is)",
                              *score, expected));
  }
  config->sigmoid_router = is_v2;
  config->expert_bias = fields.Bool("moe_router_enable_expert_bias", is_v2);
  config->norm_topk_prob = fields.Bool("norm_topk_prob", true);
  // v2 is trained and released with normalised weights only; the reference code does not read the key.
  if (is_v2 && !config->norm_topk_prob) {
    fields.Fail(Unimplemented("norm_topk_prob: false is not supported with BailingMoeV2"));
  }
  const std::optional<double> scaling = fields.Number("routed_scaling_factor", 0, 1e4);
  if (is_v2) {
    if (!scaling) fields.Fail(InvalidArgument("routed_scaling_factor: missing"));
    config->routed_scaling_factor = static_cast<float>(scaling.value_or(1));
  } else {
    if (config->expert_bias) {
      fields.Fail(Unimplemented("moe_router_enable_expert_bias: true is only for BailingMoeV2"));
    }
    if (scaling.value_or(1) != 1) {
      fields.Fail(Unimplemented("routed_scaling_factor: {} is only for BailingMoeV2", *scaling));
    }
  }
  MR_RETURN_IF_ERROR(fields.status());
  return ReadGroups(fields, config);
}

Status ReadHead(FieldReader& fields, ModelConfig* config) {
  const bool is_v2 = config->architecture == Architecture::kLingV2;
  config->vocab_size = fields.NeedInt("vocab_size", 1, kVocabMax);
  config->norm_head = fields.Bool("norm_head", false);
  config->tie_word_embeddings = fields.Bool("tie_word_embeddings", false);
  if (config->norm_head && is_v2) fields.Fail(Unimplemented("norm_head: true is only for BailingMoe (v1)"));
  if (config->norm_head && config->tie_word_embeddings) {
    fields.Fail(Unimplemented("norm_head: true with tie_word_embeddings: true is not supported"));
  }
  const int64_t mtp = fields.Int("num_nextn_predict_layers", 0, kLayersMax).value_or(0);
  if (mtp > 1 || (mtp > 0 && !is_v2)) {
    fields.Fail(Unimplemented(
        "num_nextn_predict_layers: {} is not supported (0, and 1 with BailingMoeV2, are)", mtp));
  }
  config->num_mtp_layers = static_cast<int32_t>(mtp);
  return fields.status();
}

Status ReadActivationAndDType(FieldReader& fields) {
  if (const auto act = fields.Text("hidden_act"); act && *act != "silu") {
    fields.Fail(Unimplemented("hidden_act: '{}' is not supported ('silu' is)", *act));
  }
  for (const char* key : {"torch_dtype", "dtype"}) {
    const std::optional<std::string> dtype = fields.Text(key);
    if (!dtype) continue;
    static constexpr std::string_view kKnown[] = {"bfloat16", "float16", "float32", "float8_e4m3fn"};
    std::string_view name = *dtype;
    if (name.starts_with("torch.")) name.remove_prefix(6);
    if (std::find(std::begin(kKnown), std::end(kKnown), name) == std::end(kKnown)) {
      fields.Fail(Unimplemented("{}: '{}' is not supported", key, *dtype));
    }
  }
  return fields.status();
}

// The reference's factor on attention through cos and sin: 1 + 0.1 scale ln(factor).
double MagnitudeScale(double factor, double scale) {
  return factor <= 1 ? 1 : 0.1 * scale * std::log(factor) + 1;
}

Status ReadYarn(const Json& object, const std::string& prefix, ModelConfig* config) {
  static constexpr std::string_view kKnown[] = {"type",
                                                "rope_type",
                                                "factor",
                                                "original_max_position_embeddings",
                                                "beta_fast",
                                                "beta_slow",
                                                "mscale",
                                                "mscale_all_dim",
                                                "attention_factor",
                                                "rope_theta",
                                                "partial_rotary_factor",
                                                "truncate"};
  for (const auto& item : object.items()) {
    if (std::find(std::begin(kKnown), std::end(kKnown), item.key()) == std::end(kKnown)) {
      return Unimplemented("{}{}: not supported with yarn", prefix, item.key());
    }
  }
  FieldReader fields(object, prefix);
  YarnScaling yarn;
  yarn.factor = fields.Number("factor", 1, kRopeFactorMax, /*closed=*/true).value_or(0);
  if (yarn.factor == 0) fields.Fail(InvalidArgument("{}factor: missing", prefix));
  yarn.original_max_position = static_cast<int32_t>(
      fields.Int("original_max_position_embeddings", 1, kPositionMax).value_or(config->max_position));
  yarn.beta_fast = fields.Number("beta_fast", 0, 1e6).value_or(yarn.beta_fast);
  yarn.beta_slow = fields.Number("beta_slow", 0, 1e6).value_or(yarn.beta_slow);
  const double mscale = fields.Number("mscale", 0, 100, /*closed=*/true).value_or(1);
  const double mscale_all_dim = fields.Number("mscale_all_dim", 0, 100, /*closed=*/true).value_or(0);
  const std::optional<double> attention_factor = fields.Number("attention_factor", 0, 100);
  if (!fields.Bool("truncate", true))
    fields.Fail(Unimplemented("{}truncate: false is not supported", prefix));
  if (yarn.beta_fast < yarn.beta_slow) {
    fields.Fail(
        InvalidArgument("{}beta_fast: {} is below beta_slow: {}", prefix, yarn.beta_fast, yarn.beta_slow));
  }
  if (config->architecture == Architecture::kLingV1) {
    if (attention_factor) {
      fields.Fail(Unimplemented("{}attention_factor: only for BailingMoeV2 (v1 has mscale)", prefix));
    }
    yarn.attention_factor = MagnitudeScale(yarn.factor, mscale) / MagnitudeScale(yarn.factor, mscale_all_dim);
  } else if (attention_factor) {
    yarn.attention_factor = *attention_factor;
  } else {
    // v2 reads the two scales only as a pair.
    const bool both = fields.Has("mscale") && mscale != 0 && mscale_all_dim != 0;
    yarn.attention_factor =
        both ? MagnitudeScale(yarn.factor, mscale) / MagnitudeScale(yarn.factor, mscale_all_dim)
             : MagnitudeScale(yarn.factor, 1);
  }
  MR_RETURN_IF_ERROR(fields.status());
  const double extended = yarn.factor * yarn.original_max_position;
  if (extended > static_cast<double>(kPositionMax)) {
    return InvalidArgument("{}factor: {} times {} positions is too large", prefix, yarn.factor,
                           yarn.original_max_position);
  }
  config->max_position = std::max(config->max_position, static_cast<int32_t>(extended));
  config->yarn = yarn;
  return OkStatus();
}

// The kind of scaling that one of the two objects asks for; "default" when it asks for none.
StatusOr<std::string> ScalingType(const Json& object, const std::string& name, bool type_needed) {
  if (!object.is_object()) return InvalidArgument("{}: must be an object", name);
  FieldReader fields(object, name + ".");
  const std::optional<std::string> rope_type = fields.Text("rope_type");
  const std::optional<std::string> type = fields.Text("type");
  MR_RETURN_IF_ERROR(fields.status());
  if (rope_type && type && *rope_type != *type) {
    return InvalidArgument("{}.rope_type: '{}' contradicts type: '{}'", name, *rope_type, *type);
  }
  if (rope_type) return *rope_type;
  if (type) return *type;
  if (type_needed) return InvalidArgument("{}.type: missing", name);
  return std::string("default");
}

Status ReadRopeScaling(const FieldReader& fields, ModelConfig* config) {
  bool scaled = false;
  for (const std::string name : {"rope_scaling", "rope_parameters"}) {
    if (!fields.Has(name)) continue;
    const Json& object = fields.At(name);
    MR_ASSIGN_OR_RETURN(const std::string type, ScalingType(object, name, name == "rope_scaling"));
    if (type == "default") continue;
    if (std::exchange(scaled, true)) return InvalidArgument("{}: contradicts rope_scaling", name);
    const std::string prefix = name + ".";
    if (type == "yarn") {
      MR_RETURN_IF_ERROR(ReadYarn(object, prefix, config));
    } else if (type == "linear") {
      FieldReader linear(object, prefix);
      const std::optional<double> factor = linear.Number("factor", 1, kRopeFactorMax, /*closed=*/true);
      if (!factor) linear.Fail(InvalidArgument("{}factor: missing", prefix));
      MR_RETURN_IF_ERROR(linear.status());
      config->linear_scaling = LinearScaling{*factor};
    } else {
      return Unimplemented("{}type: '{}' is not supported ('yarn' and 'linear' are)", prefix, type);
    }
  }
  return OkStatus();
}

Status ReadRope(FieldReader& fields, ModelConfig* config) {
  config->max_position = fields.NeedInt("max_position_embeddings", 1, kPositionMax);
  std::optional<double> theta = fields.Number("rope_theta", 1, 1e12);
  std::optional<double> partial = fields.Number("partial_rotary_factor", 0, 1);
  const std::optional<int64_t> rotary_dim = fields.Int("rotary_dim", 1, kHeadDimMax);
  MR_RETURN_IF_ERROR(fields.status());
  if (fields.Has("rope_parameters") && fields.At("rope_parameters").is_object()) {
    FieldReader parameters(fields.At("rope_parameters"), "rope_parameters.");
    const std::optional<double> other_theta = parameters.Number("rope_theta", 1, 1e12);
    const std::optional<double> other_partial = parameters.Number("partial_rotary_factor", 0, 1);
    MR_RETURN_IF_ERROR(parameters.status());
    if (theta && other_theta && *theta != *other_theta) {
      return InvalidArgument("rope_parameters.rope_theta: {} contradicts rope_theta: {}", *other_theta,
                             *theta);
    }
    if (!theta) theta = other_theta;
    if (!partial) partial = other_partial;
  }
  if (!theta) return InvalidArgument("rope_theta: missing");
  config->rope_theta = *theta;

  const char* source = "partial_rotary_factor";
  if (partial) {
    config->rotary_dim = static_cast<int32_t>(config->head_dim * *partial);
  } else if (rotary_dim) {
    source = "rotary_dim";
    config->rotary_dim = static_cast<int32_t>(*rotary_dim);
  } else {
    source = "head_dim";
    config->rotary_dim =
        config->architecture == Architecture::kLingV1 ? config->head_dim : config->head_dim / 2;
  }
  if (config->rotary_dim < 2 || config->rotary_dim % 2 != 0 || config->rotary_dim > config->head_dim) {
    return InvalidArgument("{}: {} rotary dimensions of head_dim: {} (must be even and at most head_dim)",
                           source, config->rotary_dim, config->head_dim);
  }
  return ReadRopeScaling(fields, config);
}

Status ReadQuantization(const FieldReader& fields, ModelConfig* config) {
  if (!fields.Has("quantization_config")) return OkStatus();
  const Json& object = fields.At("quantization_config");
  if (!object.is_object()) return InvalidArgument("quantization_config: must be an object");
  FieldReader quantization(object, "quantization_config.");
  const std::optional<std::string> method = quantization.Text("quant_method");
  const std::optional<std::string> format = quantization.Text("fmt");
  const std::optional<std::string> activations = quantization.Text("activation_scheme");
  MR_RETURN_IF_ERROR(quantization.status());
  if (!method) return InvalidArgument("quantization_config.quant_method: missing");
  if (*method != "fp8") {
    return Unimplemented("quantization_config.quant_method: '{}' is not supported ('fp8' is)", *method);
  }
  if (format && *format != "e4m3") {
    return Unimplemented("quantization_config.fmt: '{}' is not supported ('e4m3' is)", *format);
  }
  if (activations && *activations != "dynamic") {
    return Unimplemented("quantization_config.activation_scheme: '{}' is not supported ('dynamic' is)",
                         *activations);
  }
  if (!quantization.Has("weight_block_size")) {
    return Unimplemented("quantization_config.weight_block_size: missing ([128, 128] is supported)");
  }
  if (const Json& block = quantization.At("weight_block_size"); block != Json::array({128, 128})) {
    return Unimplemented("quantization_config.weight_block_size: {} is not supported ([128, 128] is)",
                         DumpJson(block));
  }
  config->fp8_block = 128;
  return OkStatus();
}

// eos_token_id of `json`: an integer, a list of them, or nothing.
Status ReadEndTokens(const Json& json, const ModelConfig& config, std::vector<int32_t>* ids) {
  const auto found = json.find("eos_token_id");
  if (found == json.end() || found->is_null()) return OkStatus();
  const Json list = found->is_array() ? *found : Json::array({*found});
  std::vector<int32_t> read;
  for (const Json& id : list) {
    if (!id.is_number_integer())
      return InvalidArgument("eos_token_id: must be an integer or a list of integers");
    if (id < 0 || id >= config.vocab_size) {
      return InvalidArgument("eos_token_id: {} is outside the vocabulary of {}", DumpJson(id),
                             config.vocab_size);
    }
    read.push_back(id.get<int32_t>());
  }
  *ids = std::move(read);
  return OkStatus();
}

Status ReadGenerationConfig(std::string_view text, ModelConfig* config) {
  MR_ASSIGN_OR_RETURN(const Json json, ParseJson(text));
  if (!json.is_object()) return InvalidArgument("not a JSON object");
  MR_RETURN_IF_ERROR(ReadEndTokens(json, *config, &config->eos_token_ids));
  Json defaults = Json::object();
  for (const char* key :
       {"do_sample", "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "max_new_tokens"}) {
    if (const auto found = json.find(key); found != json.end() && !found->is_null()) defaults[key] = *found;
  }
  if (!defaults.empty()) config->generation_defaults = DumpJson(defaults);
  return OkStatus();
}

}  // namespace

StatusOr<ModelConfig> ParseModelConfig(std::string_view config_json) {
  MR_ASSIGN_OR_RETURN(const Json json, ParseJson(config_json));
  if (!json.is_object()) return InvalidArgument("not a JSON object");
  ModelConfig config;
  MR_ASSIGN_OR_RETURN(config.architecture, ReadArchitecture(json));
  FieldReader fields(json);
  MR_RETURN_IF_ERROR(ReadActivationAndDType(fields));
  MR_RETURN_IF_ERROR(ReadAttention(fields, &config));
  MR_RETURN_IF_ERROR(ReadExperts(fields, &config));
  MR_RETURN_IF_ERROR(ReadRouter(fields, &config));
  MR_RETURN_IF_ERROR(ReadHead(fields, &config));
  MR_RETURN_IF_ERROR(ReadRope(fields, &config));
  MR_RETURN_IF_ERROR(ReadQuantization(fields, &config));
  MR_RETURN_IF_ERROR(ReadEndTokens(json, config, &config.eos_token_ids));
  return config;
}

StatusOr<ModelConfig> LoadModelConfig(const std::string& directory) {
  const std::string path = directory + "/config.json";
  MR_ASSIGN_OR_RETURN(const std::string text, ReadFile(path, kConfigBytesMax));
  StatusOr<ModelConfig> config = ParseModelConfig(text);
  if (!config.ok()) return Annotate(config.status(), path);
  const std::string generation_path = directory + "/generation_config.json";
  const StatusOr<std::string> generation = ReadFile(generation_path, kConfigBytesMax);
  if (generation.ok()) {
    MR_RETURN_IF_ERROR(Annotate(ReadGenerationConfig(*generation, &*config), generation_path));
  } else if (generation.status().code() != absl::StatusCode::kNotFound) {
    return generation.status();
  }
  return config;
}

}  // namespace millrace::engine
