// inspect: checks a checkpoint as a server would and says what it is, without loading the weights.
#include "engine/model/checkpoint.h"
#include "engine/tokenizer/chat_format.h"
#include "engine/tokenizer/tokenizer.h"
#include "server/cli/commands.h"

namespace millrace::server {
namespace {

Status Inspect(const std::string& directory) {
  MR_ASSIGN_OR_RETURN(engine::ModelConfig config, engine::LoadModelConfig(directory));
  MR_ASSIGN_OR_RETURN(const auto checkpoint, engine::Checkpoint::Open(directory));
  std::vector<std::string> unused;
  MR_RETURN_IF_ERROR(engine::CheckTensors(*checkpoint, &config, &unused));
  MR_ASSIGN_OR_RETURN(const auto tokenizer, engine::Tokenizer::Load(directory));
  const bool v2 = config.architecture == engine::Architecture::kLingV2;
  MR_ASSIGN_OR_RETURN(const auto format, engine::DetectChatFormat(directory, v2));
  const int64_t kv_bytes = int64_t{2} * 2 * config.num_kv_layers() * config.kv_size();
  fmt::print("architecture    Ling {}\n", v2 ? "v2" : "v1");
  fmt::print("layers          {} ({} dense), {} MTP\n", config.num_layers, config.num_dense_layers,
             config.num_mtp_layers);
  fmt::print("hidden          {}, heads {} / {} kv x {} (rotary {})\n", config.hidden_size, config.num_heads,
             config.num_kv_heads, config.head_dim, config.rotary_dim);
  fmt::print("experts         {}, {} per token, {} wide; shared {} wide; groups {} / {}\n",
             config.num_experts, config.experts_per_token, config.moe_intermediate_size,
             config.shared_intermediate_size, config.num_groups, config.groups_per_token);
  fmt::print("context         {} tokens{}\n", config.max_position, config.yarn ? " (YaRN)" : "");
  fmt::print("vocabulary      {} ids, {} tokens\n", config.vocab_size, tokenizer->size());
  fmt::print("chat format     {}\n", format == engine::ChatFormatKind::kLingV2 ? "Ling v2" : "Ling v1");
  fmt::print("weights         {} tensors, {:.3f} GB{}\n", checkpoint->Names().size(),
             static_cast<double>(checkpoint->total_bytes()) / 1e9,
             config.fp8_block != 0 ? ", block FP8" : "");
  fmt::print("KV cache        {} bytes per token in bf16\n", kv_bytes);
  fmt::print("digest          {}\n", engine::ModelDigest(*checkpoint, config));
  for (const std::string& name : unused) fmt::print("unused tensor   {}\n", name);
  return OkStatus();
}

}  // namespace

int RunInspect(const InspectOptions& options) {
  const Status status = Inspect(options.model);
  if (status.ok()) return 0;
  fmt::print(stderr, "millrace inspect: {}\n", Message(status));
  return 1;
}

}  // namespace millrace::server
