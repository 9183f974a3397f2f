// Whole steps of the Ling-mini-2.0 shape with random weights and random KV, beside the least time that the
// bytes (decode) or the operations and bytes (prefill) need at the card's measured ceilings.
#include <chrono>
#include <cmath>
#include <cstdio>

#include "engine/backend/cuda/step_runner.h"
#include "tests/engine/cuda/hot/support.h"
#include "tests/engine/cuda/step/bench.h"
#include "tests/engine/cuda/step/random_model.h"

namespace millrace::test {
namespace {

using engine::Batch;
using engine::PageId;
using engine::PagesFor;
using engine::Segment;
using engine::StepOutput;
using engine::cuda::ModelShape;
using engine::cuda::Result;
using engine::cuda::StepRunner;
using engine::cuda::StepRunnerOptions;

constexpr int kBatchMax = 256, kContextMax = 4096, kPrefillMax = 8192;

void Check(const Result& result) {
  if (result.ok()) return;
  std::printf("FAIL %s\n", result.message().c_str());
  std::exit(1);
}

struct Sequences {
  std::vector<std::vector<int32_t>> tokens;
  std::vector<std::vector<PageId>> pages;
  Batch batch;
};

// `count` sequences whose last `new_tokens` of `context` tokens are to be computed, on pages of their own.
Sequences Make(const ModelShape& shape, int count, int context, int new_tokens) {
  Sequences made;
  std::mt19937 engine(count * 7 + context);
  PageId page = 0;
  for (int s = 0; s < count; ++s) {
    std::vector<int32_t>& tokens = made.tokens.emplace_back(new_tokens);
    for (int32_t& token : tokens) token = static_cast<int32_t>(engine() % shape.vocab);
    std::vector<PageId>& pages = made.pages.emplace_back(PagesFor(context));
    for (PageId& id : pages) id = page++;
  }
  for (int s = 0; s < count; ++s) {
    Segment& segment = made.batch.segments.emplace_back();
    segment.tokens = made.tokens[s];
    segment.position = context - new_tokens;
    segment.pages = made.pages[s];
    segment.num_logits = 1;
  }
  return made;
}

// Distinct experts that `tokens` tokens choose in a layer when routing is uniform, the shared one included.
double DistinctExperts(const ModelShape& s, double tokens) {
  return s.num_experts * (1 - std::pow(1 - double(s.top_k) / s.num_experts, tokens)) + s.num_shared;
}

double ExpertBytes(const ModelShape& s) {
  return (s.fp8_experts ? 1.0 : 2.0) * 3 * s.hidden * s.expert_width;
}

// Weights that every step reads once, the head included.
double FixedBytes(const ModelShape& s) {
  const double attention = 2.0 * s.hidden * (s.qkv_width() + s.q_width());
  const double dense = 2.0 * 3 * s.hidden * s.dense_width;
  return s.num_layers * attention + s.dense_layers * dense +
         (s.num_layers - s.dense_layers) * 2.0 * s.num_experts * s.hidden + 2.0 * s.vocab * s.hidden;
}

double DecodeBound(const ModelShape& s, const Ceilings& ceilings, int batch, int context) {
  const double moe = (s.num_layers - s.dense_layers) * DistinctExperts(s, batch) * ExpertBytes(s);
  const double kv = double(batch) * context * s.num_layers * 2 * s.kv_heads * s.head_dim * 2;
  return (FixedBytes(s) + moe + kv) / ceilings.copy_bytes_per_second;
}

// Per kind of work the larger of operations and bytes; attention is causal and counted at the full matrix
// rate.
double PrefillBound(const ModelShape& s, const Ceilings& ceilings, int count, int length) {
  const double tokens = double(count) * length;
  const auto larger = [&](double flops, double bytes) {
    return std::max(flops / ceilings.bf16_flops_per_second, bytes / ceilings.copy_bytes_per_second);
  };
  const double moe_layers = s.num_layers - s.dense_layers;
  const double projections = double(s.hidden) * (s.qkv_width() + s.q_width());
  const double experts = larger(2 * tokens * s.slots_per_token() * 3.0 * s.hidden * s.expert_width,
                                DistinctExperts(s, tokens) * ExpertBytes(s));
  const double attention = larger(4.0 * count * (double(length) * length / 2) * s.q_width(), 0);
  return s.num_layers * (larger(2 * tokens * projections, 2 * projections) + attention) +
         moe_layers * experts +
         s.dense_layers *
             larger(2 * tokens * 3 * s.hidden * s.dense_width, 2.0 * 3 * s.hidden * s.dense_width) +
         larger(2.0 * count * s.vocab * s.hidden, 2.0 * s.vocab * s.hidden);
}

double WallSeconds(StepRunner& runner, const Batch& batch, int repeat) {
  std::vector<double> seconds;
  StepOutput output;
  for (int i = 0; i < repeat; ++i) {
    const auto begin = std::chrono::steady_clock::now();
    Check(runner.Run(batch, nullptr, &output));
    seconds.push_back(std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count());
  }
  std::sort(seconds.begin(), seconds.end());
  return seconds[seconds.size() / 2];
}

}  // namespace

namespace {

void BenchModel(Report& report, bool fp8) {
  RandomModel model;
  ModelShape shape = LingMiniShape(20);
  shape.fp8_experts = fp8;
  const std::string type = fp8 ? "fp8 " : "bf16 ";
  Check(MakeRandomModel(shape, 1, &model));
  StepRunnerOptions options;
  options.kv.num_layers = shape.num_layers;
  options.kv.num_pages = kBatchMax * PagesFor(kContextMax);
  options.kv.num_kv_heads = shape.kv_heads;
  options.kv.head_dim = shape.head_dim;
  options.rows_max = kPrefillMax;
  options.logit_rows_max = kBatchMax;
  options.mirror = false;
  std::unique_ptr<StepRunner> runner;
  Check(StepRunner::Create(model.model, options, &runner));
  FillRandom(reinterpret_cast<__nv_bfloat16*>(runner->kv_pool().data()), runner->kv_pool().size() / 2, 3);
  std::printf("weights %.1f GB, KV %.1f GB, steps %.2f GB\n", model.memory.bytes() / 1e9,
              runner->kv_pool().size() / 1e9, runner->scratch_bytes() / 1e9);
  for (const int context : {1024, kContextMax}) {
    for (const int batch : {1, 8, 32, 64, 128, 256}) {
      const Sequences sequences = Make(shape, batch, context, 1);
      StepOutput output;
      Check(runner->Run(sequences.batch, nullptr, &output));
      cudaStream_t stream = nullptr;
      Check(runner->ReplayDecode(batch, &stream));
      const double seconds = MedianSeconds(stream, [&] { Check(runner->ReplayDecode(batch, &stream)); });
      report.Step(type + "decode", batch, context, batch, seconds,
                  DecodeBound(shape, report.ceilings(), batch, context));
      if (context == 1024) {
        const double wall = WallSeconds(*runner, sequences.batch, 7);
        report.Step(type + "decode, logits on the host", batch, context, batch, wall,
                    DecodeBound(shape, report.ceilings(), batch, context));
      }
    }
  }
  const int prompts[][2] = {{1, 2048}, {4, 2048}, {1, 8192}};
  for (const auto& [count, length] : prompts) {
    const Sequences sequences = Make(shape, count, length, length);
    const double wall = WallSeconds(*runner, sequences.batch, 5);
    report.Step(type + "prefill", count, length, double(count) * length, wall,
                PrefillBound(shape, report.ceilings(), count, length));
  }
}

}  // namespace

void BenchSteps(Report& report) {
  BenchModel(report, false);
  BenchModel(report, true);
}

}  // namespace millrace::test
