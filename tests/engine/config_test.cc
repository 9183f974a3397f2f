// config.json: every field, alias, default and refusal.

#include "engine/model/config.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>

#include "tests/engine/tiny_model.h"

namespace millrace::engine {
namespace {

using ::testing::AllOf;
using ::testing::ElementsAre;
using ::testing::HasSubstr;

std::string Text(const Status& status) { return std::string(Message(status)); }

StatusOr<ModelConfig> Parse(const Json& json) { return ParseModelConfig(DumpJson(json)); }

TEST(ModelConfig, ReadsV2) {
  const auto config = Parse(TinyV2());
  ASSERT_TRUE(config.ok()) << config.status();
  EXPECT_EQ(config->architecture, Architecture::kLingV2);
  EXPECT_EQ(config->rotary_dim, 8);
  EXPECT_EQ(config->num_groups, 4);
  EXPECT_EQ(config->groups_per_token, 2);
  EXPECT_TRUE(config->sigmoid_router);
  EXPECT_TRUE(config->expert_bias);
  EXPECT_TRUE(config->use_qk_norm);
  EXPECT_EQ(config->shared_intermediate_size, 8);
  EXPECT_EQ(config->routed_scaling_factor, 2.5f);
  EXPECT_EQ(config->max_position, 32768);
  EXPECT_EQ(config->q_size(), 64);
  EXPECT_EQ(config->kv_size(), 32);
  EXPECT_THAT(config->eos_token_ids, ElementsAre(7));
  EXPECT_FALSE(config->is_moe_layer(0));
  EXPECT_TRUE(config->is_moe_layer(1));
}

TEST(ModelConfig, ReadsV1) {
  const auto config = Parse(TinyV1());
  ASSERT_TRUE(config.ok()) << config.status();
  EXPECT_EQ(config->architecture, Architecture::kLingV1);
  EXPECT_EQ(config->head_dim, 8);  // hidden / heads
  EXPECT_EQ(config->rotary_dim, 8);
  EXPECT_EQ(config->shared_intermediate_size, 16);
  EXPECT_FALSE(config->sigmoid_router);
  EXPECT_FALSE(config->expert_bias);
  EXPECT_FALSE(config->use_qk_norm);
  EXPECT_TRUE(config->norm_head);
  EXPECT_EQ(config->num_groups, 0);
  EXPECT_EQ(config->routed_scaling_factor, 1.0f);
  EXPECT_FLOAT_EQ(config->rms_norm_eps, 1e-5f);
}

TEST(ModelConfig, RotaryDimensions) {
  const struct {
    Json json;
    int32_t rotary_dim;
  } cases[] = {
      {Without(TinyV2(), "partial_rotary_factor"), 8},  // v2 halves by default
      {With(Without(TinyV2(), "partial_rotary_factor"), {{"rotary_dim", 12}}), 12},
      {With(TinyV2(), {{"rotary_dim", 12}}), 8},  // the factor wins
      {With(TinyV2(), {{"partial_rotary_factor", 1.0}}), 16},
      {With(Without(TinyV2(), "partial_rotary_factor"),
            {{"rope_parameters", {{"rope_type", "default"}, {"partial_rotary_factor", 0.25}}}}),
       4},
      {TinyV1(), 8},
  };
  for (const auto& test : cases) {
    const auto config = Parse(test.json);
    ASSERT_TRUE(config.ok()) << config.status() << DumpJson(test.json);
    EXPECT_EQ(config->rotary_dim, test.rotary_dim) << DumpJson(test.json);
  }
}

TEST(ModelConfig, AcceptsAliases) {
  Json json = Without(Without(Without(TinyV1(), "num_experts"), "num_shared_experts"), "rope_theta");
  json = With(json, {{"n_routed_experts", 4},
                     {"n_shared_experts", 2},
                     {"dtype", "bfloat16"},
                     {"rope_parameters", {{"rope_type", "default"}, {"rope_theta", 12345.0}}}});
  const auto config = Parse(json);
  ASSERT_TRUE(config.ok()) << config.status();
  EXPECT_EQ(config->num_experts, 4);
  EXPECT_EQ(config->shared_intermediate_size, 16);
  EXPECT_EQ(config->rope_theta, 12345.0);
}

TEST(ModelConfig, FallsBackToFieldsOnlyWithoutArchitectures) {
  const auto v2 = Parse(Without(TinyV2(), "architectures"));
  ASSERT_TRUE(v2.ok()) << v2.status();
  EXPECT_EQ(v2->architecture, Architecture::kLingV2);
  const auto v1 = Parse(With(Without(TinyV1(), "architectures"), {{"model_type", "bailing_moe_v2"}}));
  ASSERT_TRUE(v1.ok()) << v1.status();
  EXPECT_EQ(v1->architecture, Architecture::kLingV1);
}

TEST(ModelConfig, Yarn) {
  const Json readme = {{"type", "yarn"}, {"factor", 4.0}, {"original_max_position_embeddings", 32768}};
  const auto config = Parse(With(TinyV2(), {{"rope_scaling", readme}}));
  ASSERT_TRUE(config.ok()) << config.status();
  ASSERT_TRUE(config->yarn.has_value());
  EXPECT_NEAR(config->yarn->attention_factor, 1.1386294, 1e-7);
  EXPECT_EQ(config->yarn->original_max_position, 32768);
  EXPECT_EQ(config->yarn->beta_fast, 32);
  EXPECT_EQ(config->yarn->beta_slow, 1);
  EXPECT_EQ(config->max_position, 131072);

  const auto factor = [&](Json base, Json extra) {
    Json scaling = With(readme, extra);
    const auto parsed = Parse(With(std::move(base), {{"rope_scaling", scaling}}));
    EXPECT_TRUE(parsed.ok()) << parsed.status();
    return parsed.ok() && parsed->yarn ? parsed->yarn->attention_factor : -1;
  };
  const double ln4 = std::log(4.0);
  EXPECT_DOUBLE_EQ(factor(TinyV2(), {{"attention_factor", 1.5}}), 1.5);
  EXPECT_DOUBLE_EQ(factor(TinyV1(), {{"mscale", 0.5}}), 0.05 * ln4 + 1);
  EXPECT_DOUBLE_EQ(factor(TinyV1(), {{"mscale", 2}, {"mscale_all_dim", 1}}),
                   (0.2 * ln4 + 1) / (0.1 * ln4 + 1));
  EXPECT_DOUBLE_EQ(factor(TinyV1(), {{"factor", 1}}), 1);

  // A context already stated as the longer one stays.
  const auto longer = Parse(With(TinyV2(), {{"rope_scaling", readme}, {"max_position_embeddings", 200000}}));
  ASSERT_TRUE(longer.ok());
  EXPECT_EQ(longer->max_position, 200000);
}

TEST(ModelConfig, LinearScalingLeavesTheLimit) {
  const auto config = Parse(With(TinyV1(), {{"rope_scaling", {{"type", "linear"}, {"factor", 2}}}}));
  ASSERT_TRUE(config.ok()) << config.status();
  ASSERT_TRUE(config->linear_scaling.has_value());
  EXPECT_EQ(config->linear_scaling->factor, 2);
  EXPECT_EQ(config->max_position, 16384);
}

TEST(ModelConfig, Fp8) {
  const Json quantization = {{"quant_method", "fp8"},
                             {"fmt", "e4m3"},
                             {"activation_scheme", "dynamic"},
                             {"weight_block_size", {128, 128}}};
  const auto config = Parse(With(TinyV2(), {{"quantization_config", quantization}}));
  ASSERT_TRUE(config.ok()) << config.status();
  EXPECT_EQ(config->fp8_block, 128);
}

TEST(ModelConfig, RefusesByName) {
  const auto yarn = [](const Json& extra) {
    return Json{{"rope_scaling", With({{"type", "yarn"}, {"factor", 4.0}}, extra)}};
  };
  const auto fp8 = [](const Json& extra) {
    return Json{
        {"quantization_config", With({{"quant_method", "fp8"}, {"weight_block_size", {128, 128}}}, extra)}};
  };
  constexpr auto kInvalid = absl::StatusCode::kInvalidArgument;
  constexpr auto kUnimplemented = absl::StatusCode::kUnimplemented;
  const struct {
    Json base;
    Json patch;
    absl::StatusCode code;
    std::string message;
  } cases[] = {
      {TinyV2(),
       {{"architectures", {"BailingMoeV2_5ForCausalLM"}}},
       kUnimplemented,
       "BailingMoeV2_5ForCausalLM"},
      {TinyV2(), {{"architectures", {"BailingMoeV3ForCausalLM"}}}, kUnimplemented, "BailingMoeV3ForCausalLM"},
      {TinyV2(),
       {{"architectures", {"BailingMoeLinearForCausalLM"}}},
       kUnimplemented,
       "BailingMoeLinearForCausalLM"},
      {TinyV2(), {{"architectures", {"LlamaForCausalLM"}}}, kUnimplemented, "LlamaForCausalLM"},
      {TinyV2(), {{"architectures", Json::array()}}, kInvalid, "architectures:"},
      {TinyV2(), {{"architectures", "BailingMoeForCausalLM"}}, kInvalid, "architectures:"},
      {TinyV2(), {{"hidden_size", "32"}}, kInvalid, "hidden_size: must be an integer"},
      {TinyV2(), {{"hidden_size", 32.5}}, kInvalid, "hidden_size: must be an integer"},
      {TinyV2(), {{"hidden_size", 0}}, kInvalid, "hidden_size: 0"},
      {TinyV2(), {{"hidden_size", -32}}, kInvalid, "hidden_size: -32"},
      {TinyV2(), {{"hidden_size", int64_t{1} << 40}}, kInvalid, "hidden_size:"},
      {TinyV2(), {{"hidden_size", nullptr}}, kInvalid, "hidden_size: missing"},
      {TinyV2(), {{"num_hidden_layers", 100000}}, kInvalid, "num_hidden_layers:"},
      {TinyV2(), {{"num_key_value_heads", 3}}, kInvalid, "num_key_value_heads: 3"},
      {TinyV2(), {{"head_dim", 2048}}, kInvalid, "head_dim:"},
      {TinyV1(), {{"hidden_size", 30}}, kInvalid, "head_dim: missing"},
      {TinyV1(), {{"use_qk_norm", true}}, kUnimplemented, "use_qk_norm"},
      {TinyV2(), {{"use_qkv_bias", 1}}, kInvalid, "use_qkv_bias: must be true or false"},
      {TinyV2(), {{"use_sliding_window", true}}, kUnimplemented, "use_sliding_window"},
      {TinyV2(), {{"hidden_act", "gelu"}}, kUnimplemented, "hidden_act: 'gelu'"},
      {TinyV2(), {{"dtype", "int8"}}, kUnimplemented, "dtype: 'int8'"},
      {TinyV2(), {{"rms_norm_eps", 0}}, kInvalid, "rms_norm_eps:"},
      {TinyV2(), {{"rms_norm_eps", nullptr}}, kInvalid, "rms_norm_eps: missing"},
      {TinyV2(), {{"first_k_dense_replace", 4}}, kInvalid, "first_k_dense_replace: 4"},
      {TinyV2(), {{"intermediate_size", nullptr}}, kInvalid, "intermediate_size: missing"},
      {TinyV2(), {{"num_experts", nullptr}}, kInvalid, "num_experts: missing"},
      {TinyV2(), {{"n_routed_experts", 16}}, kInvalid, "num_experts: 8 contradicts n_routed_experts: 16"},
      {TinyV2(), {{"num_experts_per_tok", 9}}, kInvalid, "num_experts_per_tok: 9"},
      {TinyV2(),
       {{"num_experts_per_tok", 5}},
       kInvalid,
       "num_experts_per_tok: 5"},  // two groups of two are kept
      {TinyV2(), {{"num_shared_experts", nullptr}}, kInvalid, "num_shared_experts: missing"},
      {TinyV2(), {{"n_group", 3}}, kInvalid, "n_group: 3"},
      {TinyV2(), {{"n_group", 8}}, kInvalid, "n_group: 8"},
      {TinyV2(), {{"topk_group", 5}}, kInvalid, "topk_group: 5"},
      {TinyV2(), {{"topk_group", nullptr}}, kInvalid, "topk_group: missing"},
      {TinyV1(), {{"n_group", 2}, {"topk_group", 1}}, kUnimplemented, "n_group: 2"},
      {TinyV2(), {{"score_function", "softmax"}}, kUnimplemented, "score_function: 'softmax'"},
      {TinyV1(), {{"score_function", "sigmoid"}}, kUnimplemented, "score_function: 'sigmoid'"},
      {TinyV2(), {{"norm_topk_prob", false}}, kUnimplemented, "norm_topk_prob"},
      {TinyV2(), {{"routed_scaling_factor", nullptr}}, kInvalid, "routed_scaling_factor: missing"},
      {TinyV1(), {{"routed_scaling_factor", 2}}, kUnimplemented, "routed_scaling_factor: 2"},
      {TinyV2(), {{"norm_head", true}}, kUnimplemented, "norm_head"},
      {TinyV1(), {{"tie_word_embeddings", true}}, kUnimplemented, "tie_word_embeddings"},
      {TinyV2(), {{"num_nextn_predict_layers", 2}}, kUnimplemented, "num_nextn_predict_layers: 2"},
      {TinyV1(), {{"num_nextn_predict_layers", 1}}, kUnimplemented, "num_nextn_predict_layers: 1"},
      {TinyV2(), {{"vocab_size", 1 << 30}}, kInvalid, "vocab_size:"},
      {TinyV2(), {{"eos_token_id", 40}}, kInvalid, "eos_token_id: 40"},
      {TinyV2(), {{"eos_token_id", "7"}}, kInvalid, "eos_token_id:"},
      {TinyV2(), {{"rope_theta", 0.5}}, kInvalid, "rope_theta: 0.5"},
      {TinyV2(), {{"rope_theta", nullptr}}, kInvalid, "rope_theta: missing"},
      {TinyV2(), {{"partial_rotary_factor", 0.2}}, kInvalid, "partial_rotary_factor: 3"},
      {TinyV2(), {{"partial_rotary_factor", 1.5}}, kInvalid, "partial_rotary_factor: 1.5"},
      {TinyV1(), {{"rotary_dim", 10}}, kInvalid, "rotary_dim: 10"},
      {TinyV2(), {{"rope_scaling", {{"type", "dynamic"}, {"factor", 2}}}}, kUnimplemented, "'dynamic'"},
      {TinyV2(), {{"rope_scaling", {{"rope_type", "llama3"}, {"factor", 2}}}}, kUnimplemented, "'llama3'"},
      {TinyV2(),
       {{"rope_parameters", {{"rope_type", "longrope"}}}},
       kUnimplemented,
       "rope_parameters.type: 'longrope'"},
      {TinyV2(), {{"rope_scaling", {{"factor", 2}}}}, kInvalid, "rope_scaling.type: missing"},
      {TinyV2(), {{"rope_scaling", 4}}, kInvalid, "rope_scaling: must be an object"},
      {TinyV2(), {{"rope_scaling", {{"type", "linear"}}}}, kInvalid, "rope_scaling.factor: missing"},
      {TinyV2(), {{"rope_scaling", {{"type", "yarn"}}}}, kInvalid, "rope_scaling.factor: missing"},
      {TinyV2(), yarn({{"factor", 0.5}}), kInvalid, "rope_scaling.factor: 0.5"},
      {TinyV2(), yarn({{"factor", 4000}, {"original_max_position_embeddings", 1 << 20}}), kInvalid,
       "too large"},
      {TinyV2(), yarn({{"beta_fast", 1}, {"beta_slow", 32}}), kInvalid, "rope_scaling.beta_fast: 1"},
      {TinyV2(), yarn({{"truncate", false}}), kUnimplemented, "rope_scaling.truncate"},
      {TinyV2(), yarn({{"surprise", 1}}), kUnimplemented, "rope_scaling.surprise"},
      {TinyV1(), yarn({{"attention_factor", 1.5}}), kUnimplemented, "rope_scaling.attention_factor"},
      {TinyV2(), {{"max_position_embeddings", 0}}, kInvalid, "max_position_embeddings: 0"},
      {TinyV2(),
       {{"quantization_config", {{"quant_method", "gptq"}}}},
       kUnimplemented,
       "quant_method: 'gptq'"},
      {TinyV2(),
       {{"quantization_config", {{"bits", 4}}}},
       kInvalid,
       "quantization_config.quant_method: missing"},
      {TinyV2(), fp8({{"fmt", "e5m2"}}), kUnimplemented, "quantization_config.fmt: 'e5m2'"},
      {TinyV2(), fp8({{"weight_block_size", {64, 64}}}), kUnimplemented, "weight_block_size: [64,64]"},
      {TinyV2(), fp8({{"weight_block_size", nullptr}}), kUnimplemented, "weight_block_size: missing"},
      {TinyV2(), fp8({{"activation_scheme", "static"}}), kUnimplemented, "activation_scheme: 'static'"},
  };
  for (const auto& test : cases) {
    const auto config = Parse(With(test.base, test.patch));
    EXPECT_EQ(config.status().code(), test.code) << DumpJson(test.patch) << " gives " << config.status();
    EXPECT_THAT(Text(config.status()), HasSubstr(test.message)) << DumpJson(test.patch);
  }
  EXPECT_FALSE(ParseModelConfig("[]").ok());
  EXPECT_FALSE(ParseModelConfig("{").ok());
}

TEST(ModelConfig, SurvivesEveryFieldOfEveryType) {
  const Json values[] = {nullptr,
                         true,
                         -1,
                         0,
                         1,
                         3,
                         1e300,
                         -1e300,
                         int64_t{1} << 62,
                         UINT64_MAX,
                         "x",
                         Json::array(),
                         Json::array({1, "a"}),
                         Json::object(),
                         Json{{"type", 3}},
                         0.3};
  const Json fields = TinyV2();
  for (const Json& base : {TinyV2(), TinyV1()}) {
    for (const auto& item : fields.items()) {
      for (const Json& value : values) {
        const auto config = Parse(With(base, {{item.key(), value}}));
        EXPECT_EQ(config.ok(), Text(config.status()).empty()) << item.key() << DumpJson(value);
      }
    }
  }
}

TEST(ModelConfig, GenerationConfigOverridesEndTokens) {
  const TempDirectory directory;
  EXPECT_EQ(LoadModelConfig(directory.path()).status().code(), absl::StatusCode::kNotFound);
  directory.Write("config.json", DumpJson(TinyV2()));
  const auto plain = LoadModelConfig(directory.path());
  ASSERT_TRUE(plain.ok()) << plain.status();
  EXPECT_THAT(plain->eos_token_ids, ElementsAre(7));
  EXPECT_EQ(plain->generation_defaults, "");
  directory.Write("generation_config.json",
                  R"({"eos_token_id": [8, 9], "temperature": 0.7, "pad_token_id": 8})");
  const auto config = LoadModelConfig(directory.path());
  ASSERT_TRUE(config.ok()) << config.status();
  EXPECT_THAT(config->eos_token_ids, ElementsAre(8, 9));
  EXPECT_EQ(config->generation_defaults, R"({"temperature":0.7})");
  directory.Write("generation_config.json", R"({"eos_token_id": [8, 99]})");
  EXPECT_THAT(Text(LoadModelConfig(directory.path()).status()),
              AllOf(HasSubstr("generation_config.json"), HasSubstr("eos_token_id: 99")));
  directory.Write("config.json", "{\"architectures\": 3}");
  EXPECT_THAT(Text(LoadModelConfig(directory.path()).status()), HasSubstr("config.json: architectures"));
}

}  // namespace
}  // namespace millrace::engine
