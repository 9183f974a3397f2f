// Safetensors files, the reading of their tensors, and the check of a checkpoint against its config.

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <bit>
#include <cmath>
#include <limits>

#include "engine/model/checkpoint.h"
#include "engine/model/config.h"
#include "engine/model/safetensors.h"
#include "tests/engine/tiny_model.h"

namespace millrace::engine {
namespace {

using ::testing::AllOf;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;

std::string Text(const Status& status) { return std::string(Message(status)); }

StatusOr<std::unique_ptr<Checkpoint>> OpenBytes(const TempDirectory& directory, const std::string& file) {
  directory.Write("model.safetensors", file);
  return Checkpoint::Open(directory.path());
}

// ---------------------------------------------------------------- safetensors

TEST(Checkpoint, ReadsEveryDType) {
  const TempDirectory directory;
  StoredTensors tensors;
  tensors["bf16"] = {"BF16", {2, 2}, Raw<uint16_t>({0x3f80, 0xc000, 0x7f80, 0x0001})};
  tensors["f16"] = {"F16", {1, 5}, Raw<uint16_t>({0x3c00, 0xc100, 0x0001, 0x8000, 0x7c00})};
  tensors["f32"] = {"F32", {3}, Raw<float>({1.5f, -2.25f, 1e-40f})};
  tensors["i64"] = {"I64", {1}, std::string(8, '\1')};
  tensors["strange"] = {"F4_NEW", {9}, std::string(5, '\1')};
  const auto checkpoint = OpenBytes(directory, Safetensors(tensors));
  ASSERT_TRUE(checkpoint.ok()) << checkpoint.status();
  EXPECT_THAT((*checkpoint)->Names(), ElementsAre("bf16", "f16", "f32", "i64", "strange"));
  EXPECT_EQ((*checkpoint)->total_bytes(), 8 + 10 + 12 + 8 + 5);
  std::vector<float> two(2), five(5), three(3);
  ASSERT_TRUE((*checkpoint)->ReadRows("bf16", 1, 1, two).ok());
  EXPECT_THAT(two, ElementsAre(std::numeric_limits<float>::infinity(), std::bit_cast<float>(0x00010000U)));
  ASSERT_TRUE((*checkpoint)->ReadRows("f16", 0, 1, five).ok());
  EXPECT_THAT(five, ElementsAre(1.0f, -2.5f, 0x1p-24f, 0.0f, std::numeric_limits<float>::infinity()));
  EXPECT_TRUE(std::signbit(five[3]));
  ASSERT_TRUE((*checkpoint)->ReadRows("f32", 0, 1, three).ok());
  EXPECT_THAT(three, ElementsAre(1.5f, -2.25f, 1e-40f));

  EXPECT_EQ((*checkpoint)->ReadRows("none", 0, 1, two).code(), absl::StatusCode::kNotFound);
  EXPECT_EQ((*checkpoint)->ReadRows("i64", 0, 1, std::span(two).first(1)).code(),
            absl::StatusCode::kUnimplemented);
  const struct {
    int64_t row, rows;
  } bad[] = {{-1, 1}, {2, 1}, {1, 2}, {0, -1}, {0, 2}, {INT64_MAX, 1}, {1, INT64_MAX}};
  for (const auto& [row, rows] : bad) {
    EXPECT_EQ((*checkpoint)->ReadRows("bf16", row, rows, two).code(), absl::StatusCode::kInvalidArgument)
        << row << " " << rows;
  }
}

TEST(Checkpoint, DequantisesRaggedFp8) {
  const TempDirectory directory;
  // 130 x 200: blocks of 128, and edges of 2 rows and 72 columns.
  std::string codes(130 * 200, '\0');
  for (size_t i = 0; i < codes.size(); ++i) codes[i] = static_cast<char>(i % 251);
  const std::vector<float> scales = {0.5f, 3.0f, 0.125f, 7.0f};
  StoredTensors tensors;
  tensors["w"] = {"F8_E4M3", {130, 200}, codes};
  tensors["w_scale_inv"] = {"F32", {2, 2}, Raw(scales)};
  const auto checkpoint = OpenBytes(directory, Safetensors(tensors));
  ASSERT_TRUE(checkpoint.ok()) << checkpoint.status();
  // The format from its definition: sign, 4 exponent bits (bias 7), 3 mantissa bits; S.1111.111 is NaN.
  const auto decode = [](int code) -> float {
    if ((code & 0x7f) == 0x7f) return NAN;
    const int exponent = (code >> 3) & 15;
    const double magnitude =
        exponent == 0 ? std::ldexp(code & 7, -9) : std::ldexp(1 + (code & 7) / 8.0, exponent - 7);
    return static_cast<float>(code & 0x80 ? -magnitude : magnitude);
  };
  EXPECT_EQ(decode(0x7e), 448.0f);
  std::vector<float> rows(6 * 200);
  ASSERT_TRUE((*checkpoint)->ReadRows("w", 124, 6, rows).ok());
  for (size_t r = 0; r < 6; ++r) {
    for (size_t c = 0; c < 200; ++c) {
      const float expected =
          decode(static_cast<uint8_t>(codes[(124 + r) * 200 + c])) * scales[((124 + r) / 128) * 2 + c / 128];
      const float got = rows[r * 200 + c];
      ASSERT_TRUE(got == expected || (std::isnan(got) && std::isnan(expected))) << r << " " << c;
    }
  }
}

TEST(Checkpoint, Fp8NeedsItsScales) {
  const Stored weight = {"F8_E4M3", {130, 3}, std::string(390, '\1')};
  const struct {
    std::optional<Stored> scales;
    std::string message;
  } cases[] = {
      {std::nullopt, "'w_scale_inv' are missing"},
      {Stored{"F32", {1, 1}, std::string(4, '\0')}, "needs F32 [2, 1]"},
      {Stored{"BF16", {2, 1}, std::string(4, '\0')}, "'w_scale_inv': is BF16"},
  };
  for (const auto& test : cases) {
    const TempDirectory directory;
    StoredTensors tensors = {{"w", weight}};
    if (test.scales) tensors["w_scale_inv"] = *test.scales;
    const auto checkpoint = OpenBytes(directory, Safetensors(tensors));
    ASSERT_TRUE(checkpoint.ok()) << checkpoint.status();
    std::vector<float> row(3);
    const Status status = (*checkpoint)->ReadRows("w", 0, 1, row);
    EXPECT_EQ(status.code(), absl::StatusCode::kDataLoss);
    EXPECT_THAT(Text(status),
                AllOf(HasSubstr(test.message), HasSubstr("'w'"), HasSubstr("model.safetensors")));
  }
}

TEST(Checkpoint, RefusesBadHeaders) {
  const std::string good = R"("dtype":"F32","shape":[2],"data_offsets":[0,8])";
  const struct {
    std::string header;
    std::string message;
  } cases[] = {
      {"", "not valid JSON"},
      {"[]", "header is a list"},
      {"3", "header is a number"},
      {"{\"a\":{" + good + "}", "not valid JSON"},
      {"{\"a\":{" + good + "}} x", "not valid JSON"},
      {"{\"a\":{" + good + "},\"a\":{" + good + "}}", "tensor 'a': comes twice"},
      {"{\"a\":{" + good + "},\"b\":{" + good + "}}", "overlaps tensor"},
      {R"({"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"b":{"dtype":"F32","shape":[2],"data_offsets":[4,12]}})",
       "overlaps tensor 'a'"},
      {R"({"a":{"dtype":"F32","dtype":"F32","shape":[2],"data_offsets":[0,8]}})",
       "field 'dtype' comes twice"},
      {R"({"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8],"zip":1}})", "unknown field 'zip'"},
      {R"({"a":{"shape":[2],"data_offsets":[0,8]}})", "tensor 'a': has no dtype"},
      {R"({"a":{"dtype":"F32","data_offsets":[0,8]}})", "tensor 'a': has no shape"},
      {R"({"a":{"dtype":"F32","shape":[2]}})", "tensor 'a': has no data_offsets"},
      {R"({"a":{"dtype":"F32","shape":[2],"data_offsets":[0]}})", "must have two numbers"},
      {R"({"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8,8]}})", "more than two"},
      {R"({"a":{"dtype":"F32","shape":[2],"data_offsets":[8,0]}})", "outside"},
      {R"({"a":{"dtype":"F32","shape":[2],"data_offsets":[12,20]}})", "outside the file's 16 bytes"},
      {R"({"a":{"dtype":"F32","shape":[2],"data_offsets":[0,18446744073709551615]}})", "outside"},
      {R"({"a":{"dtype":"F32","shape":[2],"data_offsets":[0,28446744073709551615]}})", "fraction"},
      {R"({"a":{"dtype":"F32","shape":[3],"data_offsets":[0,8]}})", "8 bytes for a shape that needs 12"},
      {R"({"a":{"dtype":"F32","shape":[4611686018427387905],"data_offsets":[0,4]}})", "shape is too large"},
      {R"({"a":{"dtype":"F32","shape":[4294967296,4294967296],"data_offsets":[0,0]}})", "shape is too large"},
      {R"({"a":{"dtype":"NEW","shape":[4294967296,4294967296],"data_offsets":[0,0]}})", "shape is too large"},
      {R"({"a":{"dtype":"F32","shape":[18446744073709551615],"data_offsets":[0,4]}})", "is too large"},
      {R"({"a":{"dtype":"F32","shape":[-2],"data_offsets":[0,8]}})", "negative"},
      {R"({"a":{"dtype":"F32","shape":[2.0],"data_offsets":[0,8]}})", "fraction"},
      {R"({"a":{"dtype":"F32","shape":["2"],"data_offsets":[0,8]}})", "string"},
      {R"({"a":{"dtype":"F32","shape":[[2]],"data_offsets":[0,8]}})", "list"},
      {R"({"a":{"dtype":"F32","shape":[1,1,1,1,1,1,1,1,2],"data_offsets":[0,8]}})", "dimensions"},
      {R"({"a":{"dtype":4,"shape":[2],"data_offsets":[0,8]}})", "number"},
      {R"({"a":{"dtype":{},"shape":[2],"data_offsets":[0,8]}})", "object"},
      {R"({"a":[1]})", "tensor 'a': a list"},
      {R"({"a":null})", "tensor 'a': null"},
      {R"({"__metadata__":)" + std::string(50, '[') + std::string(50, ']') + "}", "nested too deeply"},
      {"{\"\xff\":{" + good + "}}", "not valid JSON"},
  };
  for (const auto& test : cases) {
    const TempDirectory directory;
    const auto checkpoint = OpenBytes(directory, WithHeader(test.header, std::string(16, '\0')));
    EXPECT_EQ(checkpoint.status().code(), absl::StatusCode::kDataLoss) << test.header << checkpoint.status();
    EXPECT_THAT(Text(checkpoint.status()), AllOf(HasSubstr(test.message), HasSubstr("model.safetensors")))
        << test.header;
  }
}

TEST(Checkpoint, AcceptsWhatTheFormatAllows) {
  const TempDirectory directory;
  const std::string header =
      R"({"__metadata__":{"format":"pt","deep":{"a":[1,2.5,null,{"b":true}]}},"empty":{"dtype":"F32","shape":[0,4],)"
      R"("data_offsets":[0,0]},"scalar":{"dtype":"F32","shape":[],"data_offsets":[0,4]}}   )";
  const auto checkpoint = OpenBytes(directory, WithHeader(header, std::string(4, '\0')));
  ASSERT_TRUE(checkpoint.ok()) << checkpoint.status();
  EXPECT_THAT((*checkpoint)->Names(), ElementsAre("empty", "scalar"));
  EXPECT_TRUE((*checkpoint)->ReadRows("empty", 0, 0, {}).ok());
  std::vector<float> one(1);
  EXPECT_EQ((*checkpoint)->ReadRows("scalar", 0, 1, one).code(), absl::StatusCode::kInvalidArgument);
  // Metadata of any type is skipped.
  EXPECT_TRUE(OpenBytes(directory, WithHeader(R"({"__metadata__":null})", "")).ok());
}

StoredTensors SmallTensors() {
  return {{"a", Filled("a", "BF16", {3, 5})}, {"b", Filled("b", "F32", {4})}, {"c", Filled("c", "I64", {2})}};
}

TEST(Checkpoint, RefusesEveryTruncation) {
  const TempDirectory directory;
  StoredTensors tensors = SmallTensors();
  tensors["c"] = {"I64", {2}, std::string(16, '\3')};
  const std::string file = Safetensors(tensors);
  ASSERT_TRUE(OpenBytes(directory, file).ok());
  for (size_t size = 0; size < file.size(); ++size) {
    const auto checkpoint = OpenBytes(directory, file.substr(0, size));
    ASSERT_EQ(checkpoint.status().code(), absl::StatusCode::kDataLoss) << size;
  }
  for (const uint64_t length :
       {UINT64_MAX, UINT64_MAX - 7, uint64_t{1} << 62, kSafetensorsHeaderBytesMax + 1}) {
    std::string damaged = file;
    for (size_t i = 0; i < 8; ++i) damaged[i] = static_cast<char>(length >> (8 * i));
    EXPECT_EQ(OpenBytes(directory, damaged).status().code(), absl::StatusCode::kDataLoss) << length;
  }
}

TEST(Checkpoint, SurvivesByteFlips) {
  StoredTensors tensors = SmallTensors();
  tensors["c"] = {"F8_E4M3", {2, 8}, std::string(16, '\3')};
  tensors["c_scale_inv"] = {"F32", {1, 1}, std::string(4, '\3')};
  const std::string file = Safetensors(tensors);
  const TempDirectory directory;
  int refused = 0;
  for (uint64_t seed = 0; seed < 2000; ++seed) {
    SCOPED_TRACE(seed);
    Random random(seed * 1000);
    std::string damaged = file;
    const uint64_t flips = 1 + random.Below(3);
    for (uint64_t i = 0; i < flips; ++i) {
      damaged[random.Below(file.size())] = static_cast<char>(random.Below(256));
    }
    const auto checkpoint = OpenBytes(directory, damaged);
    if (!checkpoint.ok()) {
      ++refused;
      continue;
    }
    // What was accepted can be read to its last byte.
    for (const std::string& name : (*checkpoint)->Names()) {
      const TensorView tensor = *(*checkpoint)->Tensor(name);
      if (tensor.shape.empty() || tensor.shape.size() > 2 || tensor.elements() > 1000) continue;
      std::vector<float> out(static_cast<size_t>(tensor.elements()));
      (void)(*checkpoint)->ReadRows(name, 0, tensor.shape.size() == 2 ? tensor.shape[0] : 1, out);
    }
  }
  EXPECT_GT(refused, 1000);
  EXPECT_LT(refused, 2000);
}

TEST(Checkpoint, ReadsShards) {
  const TempDirectory directory;
  EXPECT_THAT(Text(Checkpoint::Open(directory.path()).status()), HasSubstr("neither model.safetensors nor"));
  StoredTensors first = SmallTensors(), second;
  second["c"] = {"F32", {1}, std::string(4, '\0')};
  first.erase("c");
  directory.Write("one.safetensors", Safetensors(first));
  const auto index = [&](const Json& map) {
    directory.Write("model.safetensors.index.json",
                    DumpJson(Json{{"metadata", {{"total_size", 1}}}, {"weight_map", map}}));
    return Checkpoint::Open(directory.path());
  };
  const Json map = {{"a", "one.safetensors"}, {"b", "one.safetensors"}, {"c", "two.safetensors"}};
  const auto missing = index(map);
  EXPECT_EQ(missing.status().code(), absl::StatusCode::kNotFound);
  EXPECT_THAT(Text(missing.status()), AllOf(HasSubstr("'two.safetensors'"), HasSubstr("'c'")));
  directory.Write("two.safetensors", Safetensors(second));
  const auto checkpoint = index(map);
  ASSERT_TRUE(checkpoint.ok()) << checkpoint.status();
  EXPECT_THAT((*checkpoint)->Names(), ElementsAre("a", "b", "c"));
  EXPECT_THAT((*checkpoint)->Tensor("c")->file, HasSubstr("two.safetensors"));

  const struct {
    Json map;
    std::string message;
  } cases[] = {
      {With(map, {{"d", "one.safetensors"}}), "'d' is in the index but not in the file"},
      {With(map, {{"a", "two.safetensors"}}), "'a' is in the index but not in the file"},
      {With(map, {{"a", "../one.safetensors"}}), "not a plain file name"},
      {With(map, {{"a", "/etc/passwd"}}), "not a plain file name"},
      {With(map, {{"a", ".."}}), "not a plain file name"},
      {With(map, {{"a", ""}}), "not a plain file name"},
      {With(map, {{"a", std::string("one\0", 4)}}), "not a plain file name"},
      {With(map, {{"a", 3}}), "weight_map.a: must be a file name"},
      {Json::object(), "weight_map: is empty"},
      {3, "weight_map: must be an object"},
  };
  for (const auto& test : cases) {
    const auto opened = index(test.map);
    EXPECT_EQ(opened.status().code(), absl::StatusCode::kDataLoss) << DumpJson(test.map);
    EXPECT_THAT(Text(opened.status()), HasSubstr(test.message));
  }
  second["a"] = first["a"];
  directory.Write("two.safetensors", Safetensors(second));
  EXPECT_THAT(Text(index(map).status()), HasSubstr("'a' is also in"));
}

// ---------------------------------------------------------------- tensors against config

void AddMlp(StoredTensors* tensors, const std::string& prefix, int64_t width, int64_t h) {
  for (const char* name : {"gate_proj.weight", "up_proj.weight"}) {
    (*tensors)[prefix + name] = Filled(prefix + name, "BF16", {width, h});
  }
  (*tensors)[prefix + "down_proj.weight"] = Filled(prefix + "down_proj.weight", "BF16", {h, width});
}

// Written out from the layout of Ling checkpoints, apart from the code under test. `layers` main layers and
// then, when `mtp`, one more with the MTP tensors.
StoredTensors ModelTensors(const ModelConfig& c, int32_t layers, bool mtp) {
  StoredTensors tensors;
  const auto add = [&](const std::string& name, const std::vector<int64_t>& shape,
                       const char* dtype = "BF16") { tensors[name] = Filled(name, dtype, shape); };
  const int64_t h = c.hidden_size;
  add("model.word_embeddings.weight", {c.vocab_size, h});
  add("model.norm.weight", {h}, "F32");
  add("lm_head.weight", {c.vocab_size, h});
  for (int32_t layer = 0; layer < layers + (mtp ? 1 : 0); ++layer) {
    const std::string p = fmt::format("model.layers.{}.", layer);
    add(p + "input_layernorm.weight", {h});
    add(p + "post_attention_layernorm.weight", {h});
    add(p + "attention.query_key_value.weight", {(c.num_heads + 2 * c.num_kv_heads) * c.head_dim, h});
    add(p + "attention.dense.weight", {h, c.num_heads * c.head_dim});
    if (c.architecture == Architecture::kLingV2) {
      add(p + "attention.query_layernorm.weight", {c.head_dim});
      add(p + "attention.key_layernorm.weight", {c.head_dim});
    }
    if (layer < c.num_dense_layers) {
      AddMlp(&tensors, p + "mlp.", c.intermediate_size, h);
      continue;
    }
    add(p + "mlp.gate.weight", {c.num_experts, h});
    if (c.architecture == Architecture::kLingV2) add(p + "mlp.gate.expert_bias", {c.num_experts}, "F32");
    for (int32_t e = 0; e < c.num_experts; ++e) {
      AddMlp(&tensors, fmt::format("{}mlp.experts.{}.", p, e), c.moe_intermediate_size, h);
    }
    AddMlp(&tensors, p + "mlp.shared_experts.", c.shared_intermediate_size, h);
  }
  if (mtp) {
    const std::string p = fmt::format("model.layers.{}.", layers);
    for (const char* norm : {"enorm.weight", "hnorm.weight", "final_layernorm.weight"}) add(p + norm, {h});
    add(p + "eh_proj.weight", {h, 2 * h});
  }
  return tensors;
}

ModelConfig Config(const Json& json) {
  const auto config = ParseModelConfig(DumpJson(json));
  EXPECT_TRUE(config.ok()) << config.status();
  return *config;
}

struct Checked {
  Status status;
  ModelConfig config;
  std::vector<std::string> unused;
};
Checked CheckModel(const Json& json, const StoredTensors& tensors) {
  Checked result;
  result.config = Config(json);
  const TempDirectory directory;
  const auto checkpoint = OpenBytes(directory, Safetensors(tensors));
  EXPECT_TRUE(checkpoint.ok()) << checkpoint.status();
  result.status = CheckTensors(**checkpoint, &result.config, &result.unused);
  return result;
}

TEST(CheckTensors, AcceptsBothVersions) {
  const ModelConfig v2 = Config(TinyV2());
  const StoredTensors v2_tensors = ModelTensors(v2, 3, false);
  EXPECT_EQ(v2_tensors.size(), size_t{3 + 6 * 3 + 3 + 2 * (3 * 8 + 5)});
  const Checked checked = CheckModel(TinyV2(), v2_tensors);
  EXPECT_TRUE(checked.status.ok()) << checked.status;
  EXPECT_THAT(checked.unused, IsEmpty());
  EXPECT_EQ(checked.config.num_layers, 3);
  EXPECT_EQ(checked.config.num_mtp_layers, 0);

  const StoredTensors v1_tensors = ModelTensors(Config(TinyV1()), 2, false);
  EXPECT_EQ(v1_tensors.size(), size_t{3 + 2 * (8 + 3 * 4)});
  const Checked v1 = CheckModel(TinyV1(), v1_tensors);
  EXPECT_TRUE(v1.status.ok()) << v1.status;
  EXPECT_THAT(v1.unused, IsEmpty());
}

TEST(CheckTensors, FindsTheMtpLayerInBothConventions) {
  const ModelConfig config = Config(TinyV2());
  for (const int32_t nextn : {0, 1}) {
    const Json json = With(TinyV2(), {{"num_nextn_predict_layers", nextn}});
    const Checked additive = CheckModel(json, ModelTensors(config, 3, true));
    EXPECT_TRUE(additive.status.ok()) << additive.status;
    EXPECT_EQ(additive.config.num_layers, 3);
    EXPECT_EQ(additive.config.num_mtp_layers, 1);
    EXPECT_EQ(additive.config.num_kv_layers(), 4);
    EXPECT_THAT(additive.unused, IsEmpty());
    const Checked inclusive = CheckModel(json, ModelTensors(config, 2, true));
    EXPECT_TRUE(inclusive.status.ok()) << inclusive.status;
    EXPECT_EQ(inclusive.config.num_layers, 2);
    EXPECT_EQ(inclusive.config.num_mtp_layers, 1);
    const Checked absent = CheckModel(json, ModelTensors(config, 3, false));
    EXPECT_TRUE(absent.status.ok()) << absent.status;
    EXPECT_EQ(absent.config.num_layers, 3);
    EXPECT_EQ(absent.config.num_mtp_layers, 0);
  }
}

TEST(CheckTensors, IgnoresLeftoversAndListsTheRest) {
  StoredTensors tensors = ModelTensors(Config(TinyV2()), 3, true);
  for (const char* name : {"model.layers.0.attention.rotary_emb.inv_freq", "v_head.weight",
                           "model.layers.3.embed_tokens.weight", "model.layers.3.shared_head.head.weight",
                           "model.layers.1.embed_tokens.weight", "model.extra.weight"}) {
    tensors[name] = Filled(name, "F32", {2});
  }
  const Checked checked = CheckModel(TinyV2(), tensors);
  ASSERT_TRUE(checked.status.ok()) << checked.status;
  EXPECT_THAT(checked.unused, ElementsAre("model.extra.weight", "model.layers.1.embed_tokens.weight"));
}

TEST(CheckTensors, OptionalTensors) {
  const ModelConfig config = Config(TinyV2());
  StoredTensors tensors = ModelTensors(config, 3, false);
  tensors.erase("lm_head.weight");
  EXPECT_THAT(Text(CheckModel(TinyV2(), tensors).status), HasSubstr("'lm_head.weight' is missing"));
  EXPECT_TRUE(CheckModel(With(TinyV2(), {{"tie_word_embeddings", true}}), tensors).status.ok());

  const Json biased = With(TinyV2(), {{"use_qkv_bias", true}, {"use_bias", true}});
  tensors = ModelTensors(config, 3, false);
  for (int layer = 0; layer < 3; ++layer) {
    const std::string p = fmt::format("model.layers.{}.attention.", layer);
    EXPECT_EQ(CheckModel(biased, tensors).status.code(), absl::StatusCode::kNotFound);
    tensors[p + "query_key_value.bias"] = Filled(p, "BF16", {128});
    EXPECT_EQ(CheckModel(biased, tensors).status.code(), absl::StatusCode::kNotFound);
    tensors[p + "dense.bias"] = Filled(p, "BF16", {32});
  }
  const Checked checked = CheckModel(biased, tensors);
  EXPECT_TRUE(checked.status.ok()) << checked.status;
  EXPECT_THAT(checked.unused, IsEmpty());

  // A bias in the checkpoint is used even if the config forgets it.
  const Checked forgotten =
      CheckModel(With(TinyV2(), {{"moe_router_enable_expert_bias", false}}), ModelTensors(config, 3, false));
  EXPECT_TRUE(forgotten.config.expert_bias);
  EXPECT_THAT(forgotten.unused, IsEmpty());
}

TEST(CheckTensors, NamesEveryMissingAndMisshapenTensor) {
  const StoredTensors good = ModelTensors(Config(TinyV2()), 3, true);
  for (const auto& [name, stored] : good) {
    // Without eh_proj the layer is no MTP layer but one too many; without the first expert_bias v2 still
    // wants it.
    StoredTensors tensors = good;
    tensors.erase(name);
    const Checked missing = CheckModel(TinyV2(), tensors);
    EXPECT_FALSE(missing.status.ok()) << name;
    if (name.find("eh_proj") == std::string::npos) {
      EXPECT_THAT(Text(missing.status), AllOf(HasSubstr("'" + name + "' is missing"))) << name;
    }
    std::vector<int64_t> shape = stored.shape;
    shape[0] += 1;
    tensors[name] = Filled(name, stored.dtype, shape);
    const Checked misshapen = CheckModel(TinyV2(), tensors);
    EXPECT_EQ(misshapen.status.code(), absl::StatusCode::kInvalidArgument) << name;
    EXPECT_THAT(
        Text(misshapen.status),
        AllOf(HasSubstr("'" + name + "': has shape [" + std::to_string(shape[0])),
              HasSubstr("calls for [" + std::to_string(stored.shape[0])), HasSubstr("model.safetensors")));
  }
}

TEST(CheckTensors, Refusals) {
  const Json fp8 =
      With(TinyV2(), {{"quantization_config", {{"quant_method", "fp8"}, {"weight_block_size", {128, 128}}}}});
  const std::string dense = "model.layers.1.attention.dense.weight";
  const std::string bias = "model.layers.1.mlp.gate.expert_bias";
  const struct {
    Json json;
    StoredTensors changes;
    std::string message;
  } cases[] = {
      {TinyV2(), {{dense, Filled("", "F8_E4M3", {32, 64})}}, "no quantization_config"},
      {fp8, {{dense, Filled("", "F8_E4M3", {32, 64})}}, "scales '" + dense + "_scale_inv' are missing"},
      {fp8,
       {{dense, Filled("", "F8_E4M3", {32, 64})}, {dense + "_scale_inv", Filled("", "F32", {1, 2})}},
       "is F32 [1, 2], but '" + dense + "' of shape [32, 64] needs F32 [1, 1]"},
      {fp8, {{dense + "_scale_inv", Filled("", "F32", {1, 1})}}, "yet there are scales"},
      {TinyV2(),
       {{dense, {"I32", {32, 64}, std::string(32 * 64 * 4, '\0')}}},
       "I32 [32, 64] is not supported"},
      {TinyV2(), {{"model.norm.weight", Filled("", "F8_E4M3", {32})}}, "F8_E4M3 [32] is not supported"},
      {TinyV2(), {{bias, Filled("", "F16", {8})}}, "F16 [8] is not supported"},
      {TinyV2(), {{"model.layers.3.input_layernorm.weight", Filled("", "BF16", {32})}}, "is in layer 3, but"},
      {TinyV2(), {{"model.layers.5.eh_proj.weight", Filled("", "BF16", {32, 64})}}, "is in layer 5, but"},
      {TinyV2(),
       {{"model.layers.1.eh_proj.weight", Filled("", "BF16", {32, 64})},
        {"model.layers.2.eh_proj.weight", Filled("", "BF16", {32, 64})}},
       "layers 1 and 2 both have"},
      {With(TinyV2(), {{"num_hidden_layers", 4}}), {}, "'model.layers.3.input_layernorm.weight' is missing"},
  };
  for (const auto& test : cases) {
    StoredTensors tensors = ModelTensors(Config(TinyV2()), 3, false);
    for (const auto& [name, stored] : test.changes) tensors[name] = stored;
    const Checked checked = CheckModel(test.json, tensors);
    EXPECT_FALSE(checked.status.ok()) << test.message;
    EXPECT_THAT(Text(checked.status), HasSubstr(test.message));
  }
  StoredTensors tensors = ModelTensors(Config(TinyV2()), 3, false);
  tensors[dense] = Filled("", "F8_E4M3", {32, 64});
  tensors[dense + "_scale_inv"] = Filled("", "F32", {1, 1});
  tensors[bias] = Filled("", "BF16", {8});
  const Checked checked = CheckModel(fp8, tensors);
  EXPECT_TRUE(checked.status.ok()) << checked.status;
  EXPECT_THAT(checked.unused, IsEmpty());
}

// ---------------------------------------------------------------- digest

TEST(ModelDigest, DependsOnContentAloneAndOnAllOfIt) {
  const ModelConfig config = Config(TinyV2());
  StoredTensors tensors = ModelTensors(config, 3, false);
  tensors["big"] = Filled("big", "F32", {100, 100});
  const TempDirectory one, two;
  const auto digest = [&](const TempDirectory& directory, const ModelConfig& used) {
    const auto checkpoint = Checkpoint::Open(directory.path());
    EXPECT_TRUE(checkpoint.ok()) << checkpoint.status();
    return ModelDigest(**checkpoint, used);
  };
  one.Write("model.safetensors", Safetensors(tensors));
  const std::string base = digest(one, config);
  EXPECT_EQ(base.size(), size_t{32});
  EXPECT_EQ(digest(one, config), base);

  StoredTensors halves[2];
  Json map;
  for (const auto& [name, stored] : tensors) {
    const int half = name.size() % 2;
    halves[half][name] = stored;
    map[name] = half == 0 ? "x.safetensors" : "y.safetensors";
  }
  two.Write("x.safetensors", Safetensors(halves[0]));
  two.Write("y.safetensors", Safetensors(halves[1]));
  two.Write("model.safetensors.index.json", DumpJson(Json{{"weight_map", map}}));
  EXPECT_EQ(digest(two, config), base);

  ModelConfig other = config;
  other.rotary_dim += 2;
  EXPECT_NE(digest(one, other), base);
  other = config;
  other.yarn = YarnScaling{};
  EXPECT_NE(digest(one, other), base);
  other = config;
  other.generation_defaults = "{}";
  EXPECT_EQ(digest(one, other), base);

  for (auto& [name, stored] : tensors) {
    for (const size_t at : {size_t{0}, stored.bytes.size() - 1}) {
      stored.bytes[at] = static_cast<char>(stored.bytes[at] ^ 1);
      one.Write("model.safetensors", Safetensors(tensors));
      EXPECT_NE(digest(one, config), base) << name << " " << at;
      stored.bytes[at] = static_cast<char>(stored.bytes[at] ^ 1);
    }
  }
  tensors["big"].shape = {50, 200};
  one.Write("model.safetensors", Safetensors(tensors));
  EXPECT_NE(digest(one, config), base);
}

}  // namespace
}  // namespace millrace::engine
