#pragma once
// Random work for the ranks of an expert group, and what a single process makes of it.

#include <gtest/gtest.h>

#include <algorithm>
#include <memory>
#include <string>
#include <vector>

#include "base/digest.h"
#include "base/random.h"
#include "engine/backend/cpu/cpu_backend.h"
#include "engine/moe/rank_group.h"
#include "tests/bench/random_model.h"

namespace millrace::engine {

// v1: softmax router, no group limit, no MTP. v2: sigmoid router with bias and groups, MTP layer.
inline ModelConfig GroupModel(bool v2) {
  ModelConfig c = *ShapeNamed("ling-bench-s", 3);
  c.hidden_size = 128;
  c.num_heads = 4;
  c.num_kv_heads = 2;
  c.head_dim = 32;
  c.rotary_dim = 16;
  c.intermediate_size = 192;
  c.moe_intermediate_size = c.shared_intermediate_size = 96;
  c.vocab_size = 512;
  if (v2) {
    c.num_mtp_layers = 1;
  } else {
    c.architecture = Architecture::kLingV1;
    c.sigmoid_router = c.expert_bias = c.use_qk_norm = false;
    c.num_groups = c.groups_per_token = 0;
    c.rotary_dim = 32;
    c.num_dense_layers = 0;
  }
  return c;
}

struct GroupCase {
  bool v2 = true;
  Precision precision = Precision::kFloat32;
  Quantization quantization = Quantization::kNone;
};

inline CpuWeightsOptions WeightsOf(const GroupCase& c) {
  CpuWeightsOptions options;
  options.precision = c.precision;
  options.quantization = c.quantization;
  options.num_threads = 1;
  return options;
}

inline CpuBackendOptions BackendOf(const GroupCase& c) {
  CpuBackendOptions options;
  options.num_threads = 1;
  options.num_pages = 12;
  options.batch_tokens_max = 96;
  options.logit_rows_max = 16;
  options.with_mtp = c.v2;
  return options;
}

// One rank's work: sequences that prefill by chunks and decode, in ragged batches. A pure function of seed
// and step, so that it can be run anywhere.
class GroupScript {
 public:
  GroupScript(uint64_t seed, bool v2) : seed_(seed), v2_(v2), tokens_(kSequences) {
    Random random(seed);
    for (size_t s = 0; s < kSequences; ++s) {
      for (int i = 0; i < kLength; ++i) tokens_[s].push_back(static_cast<int32_t>(random.Below(512)));
      for (int32_t p = 0; p < 3; ++p) pages_[s].push_back(static_cast<int32_t>(s) * 3 + p);
    }
    Restart();
  }

  // Runs the next step, and returns a digest of everything that came out of it. Two runs of the same script
  // that got as far give the same digests.
  StatusOr<uint64_t> Next(Backend& backend) {
    Random random(seed_ * 1000003 + step_++);
    Batch batch;
    std::vector<std::vector<int32_t>> next_tokens(kSequences);
    std::vector<size_t> picked;
    for (size_t s = 0; s < kSequences; ++s) {
      if (position_[s] >= kLength - 1) position_[s] = 0;
      if (random.Below(4) == 0) continue;
      const bool prefill = random.Below(3) == 0;
      const int32_t count = std::min<int32_t>(prefill ? 1 + static_cast<int32_t>(random.Below(20)) : 1,
                                              kLength - 1 - position_[s]);
      Segment segment;
      segment.tokens =
          std::span(tokens_[s]).subspan(static_cast<size_t>(position_[s]), static_cast<size_t>(count));
      segment.position = position_[s];
      segment.pages = pages_[s];
      segment.num_logits = 1;
      if (v2_ && random.Below(2) == 0) {
        next_tokens[s].assign(tokens_[s].begin() + position_[s] + 1,
                              tokens_[s].begin() + position_[s] + 1 + count);
        segment.next_tokens = next_tokens[s];
      }
      position_[s] += count;
      batch.segments.push_back(segment);
      picked.push_back(s);
    }
    if (batch.segments.empty()) return uint64_t{0};
    MR_ASSIGN_OR_RETURN(const StepOutput output, backend.Forward(batch, {}));
    uint64_t digest = Xxh3(std::as_bytes(output.logits));
    digest = Xxh3(std::as_bytes(output.mtp_logits), digest);
    if (v2_ && random.Below(2) == 0) {
      const std::vector<float> hidden(output.hidden.begin(),
                                      output.hidden.begin() + backend.config().hidden_size);
      MtpSegment draft;
      const int32_t next = 7;
      draft.next_tokens = std::span(&next, 1);
      draft.hidden = hidden;
      draft.position = position_[picked.front()] - 1;
      draft.pages = pages_[picked.front()];
      MR_ASSIGN_OR_RETURN(const std::span<const float> logits, backend.ForwardMtp({&draft, 1}));
      digest = Xxh3(std::as_bytes(logits), digest);
    }
    return digest;
  }

  // From the beginning. The MTP layer reads rows that this script has not written: they must be zero again.
  void Restart() {
    step_ = 0;
    position_.assign(kSequences, 0);
  }

 private:
  static constexpr size_t kSequences = 4;
  static constexpr int32_t kLength = 150;
  const uint64_t seed_;
  const bool v2_;
  uint64_t step_ = 0;
  std::vector<std::vector<int32_t>> tokens_;
  std::vector<int32_t> pages_[kSequences];
  std::vector<int32_t> position_;
};

// What one process, alone, makes of the script of every rank.
inline std::vector<std::vector<uint64_t>> Expected(const GroupCase& c, const TensorSource& source, int ranks,
                                                   int steps) {
  const auto weights = LoadCpuWeights(source, GroupModel(c.v2), WeightsOf(c));
  std::vector<std::vector<uint64_t>> digests;
  for (int rank = 0; rank < ranks; ++rank) {
    const auto backend = MakeCpuBackend(*weights, BackendOf(c));
    GroupScript script(static_cast<uint64_t>(rank) + 1, c.v2);
    std::vector<uint64_t>& of_rank = digests.emplace_back();
    for (int i = 0; i < steps; ++i) of_rank.push_back(*script.Next(**backend));
  }
  return digests;
}

// Where ranks meet, chosen by what is linked: shm_group_test.cc or net_group_test.cc.
class GroupPlace {
 public:
  virtual ~GroupPlace() = default;
  virtual StatusOr<std::unique_ptr<ExpertGroup>> Join(const RankGroupOptions& options) const = 0;
};
std::unique_ptr<GroupPlace> MakeGroupPlace(int ranks);

struct GroupRank {
  std::unique_ptr<ExpertGroup> group;
  std::unique_ptr<Backend> backend;  // goes first
};

// One rank, with nothing loaded but what it is to hold.
inline StatusOr<GroupRank> StartRank(const GroupCase& c, const TensorSource& source, const GroupPlace& place,
                                     int rank, int ranks, int redundant, CpuGroupOptions group_options = {},
                                     Duration heartbeat_max = std::chrono::seconds(30)) {
  const ModelConfig config = GroupModel(c.v2);
  const LayerPlacement placement = InitialPlacement(config.num_experts, ranks, redundant);
  CpuWeightsOptions options = WeightsOf(c);
  options.holds = [&](int32_t, int32_t expert) {
    return (placement[static_cast<size_t>(expert)] >> rank & 1) != 0;
  };
  MR_ASSIGN_OR_RETURN(const std::shared_ptr<const Weights> weights, LoadCpuWeights(source, config, options));
  CpuBackendOptions backend = BackendOf(c);
  RankGroupOptions join;
  join.rank = rank;
  MR_ASSIGN_OR_RETURN(join.shape, CpuGroupShape(*weights, backend, ranks, 1));
  join.held.assign(static_cast<size_t>(join.shape.num_layers), placement);
  join.heartbeat_max = heartbeat_max;
  join.stall_max = std::chrono::seconds(120);
  join.form_max = std::chrono::seconds(120);
  GroupRank result;
  MR_ASSIGN_OR_RETURN(result.group, place.Join(join));
  backend.group = group_options;
  backend.group.group = result.group.get();
  backend.group.source = &source;
  MR_ASSIGN_OR_RETURN(result.backend, MakeCpuBackend(weights, backend));
  return result;
}

}  // namespace millrace::engine
