#pragma once
// Checkpoints small enough to be written by a test: configs of both versions and a safetensors writer.

#include <cstdint>
#include <filesystem>
#include <fstream>
#include <map>
#include <string>
#include <vector>

#include "base/digest.h"
#include "base/json.h"
#include "base/random.h"

namespace millrace::engine {

class TempDirectory {
 public:
  TempDirectory() : path_(std::filesystem::temp_directory_path() / RandomName("millrace-model-")) {
    std::filesystem::create_directory(path_);
  }
  ~TempDirectory() { std::filesystem::remove_all(path_); }
  std::string path() const { return path_.string(); }
  void Write(const std::string& name, const std::string& content) const {
    std::ofstream(path_ / name, std::ios::binary) << content;
  }

 private:
  std::filesystem::path path_;
};

struct Stored {
  std::string dtype;
  std::vector<int64_t> shape;
  std::string bytes;
};
using StoredTensors = std::map<std::string, Stored>;

inline int64_t Count(const std::vector<int64_t>& shape) {
  int64_t count = 1;
  for (const int64_t dim : shape) count *= dim;
  return count;
}

inline std::string WithHeader(const std::string& header, const std::string& data) {
  std::string file;
  for (int i = 0; i < 8; ++i) file.push_back(static_cast<char>(header.size() >> (8 * i)));
  return file + header + data;
}

inline std::string Safetensors(const StoredTensors& tensors) {
  Json header = {{"__metadata__", {{"format", "pt"}}}};
  std::string data;
  for (const auto& [name, tensor] : tensors) {
    header[name] = {{"dtype", tensor.dtype},
                    {"shape", tensor.shape},
                    {"data_offsets", {data.size(), data.size() + tensor.bytes.size()}}};
    data += tensor.bytes;
  }
  return WithHeader(DumpJson(header), data);
}

template <typename T>
std::string Raw(const std::vector<T>& values) {
  return std::string(reinterpret_cast<const char*>(values.data()), values.size() * sizeof(T));
}

// Bytes that differ from tensor to tensor, as a checkpoint's do.
inline Stored Filled(const std::string& name, const std::string& dtype, const std::vector<int64_t>& shape) {
  const int64_t width = dtype == "F32" ? 4 : dtype == "F8_E4M3" ? 1 : 2;
  Random random(Xxh3(AsBytes(name)));
  std::string bytes(static_cast<size_t>(Count(shape) * width), '\0');
  for (char& byte : bytes) byte = static_cast<char>(random.Below(64));
  return {dtype, shape, bytes};
}

inline Json TinyV2() {
  return Json::parse(R"({
    "architectures": ["BailingMoeV2ForCausalLM"], "model_type": "bailing_moe", "hidden_act": "silu",
    "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
    "intermediate_size": 48, "moe_intermediate_size": 8, "num_experts": 8, "num_experts_per_tok": 2,
    "num_shared_experts": 1, "first_k_dense_replace": 1, "n_group": 4, "topk_group": 2, "score_function": "sigmoid",
    "moe_router_enable_expert_bias": true, "norm_topk_prob": true, "routed_scaling_factor": 2.5, "use_qk_norm": true,
    "partial_rotary_factor": 0.5, "rope_theta": 600000, "rope_scaling": null, "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6, "vocab_size": 40, "eos_token_id": 7, "num_nextn_predict_layers": 0,
    "torch_dtype": "bfloat16"})");
}

inline Json TinyV1() {
  return Json::parse(R"({
    "architectures": ["BailingMoeForCausalLM"], "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "moe_intermediate_size": 8, "num_experts": 4, "num_experts_per_tok": 2,
    "num_shared_experts": 2, "norm_topk_prob": true, "norm_head": true, "rope_theta": 600000, "rope_scaling": null,
    "max_position_embeddings": 16384, "rms_norm_eps": 1e-5, "vocab_size": 40, "eos_token_id": 7})");
}

inline Json With(Json json, const Json& patch) {
  for (const auto& item : patch.items()) json[item.key()] = item.value();
  return json;
}
inline Json Without(Json json, const std::string& key) {
  json.erase(key);
  return json;
}

}  // namespace millrace::engine
