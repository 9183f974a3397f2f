#include "engine/backend/cpu/attention.h"

#include <algorithm>
#include <cstring>

#include "base/check.h"

namespace millrace::engine {
namespace {

constexpr int32_t kSpanPages = 16;

}  // namespace

AttentionRunner::Scratch::Scratch(int32_t head_dim)
    : sums(3, static_cast<size_t>(std::max(kAttentionQueries * (head_dim + 2),
                                           head_dim * kPageTokens + kAttentionQueries * (kPageTokens + 1)) +
                                  15) /
                  16 * 64) {
  // The kernel computes with keys that a page does not have yet, and drops what comes out. What lies there
  // must be no denormal numbers, as any integers are: those are slow (a whole short-context step took 2 to 5
  // times as long).
  std::memset(sums[2], 0, static_cast<size_t>(head_dim) * kPageTokens * sizeof(float));
  queries.reserve(kAttentionQueries);
  num_keys.reserve(kAttentionQueries);
}

AttentionRunner::AttentionRunner(const KvLayout& layout, int32_t num_heads, const KernelTable& kernels,
                                 ThreadPool& pool)
    : layout_(layout),
      group_(num_heads / layout.num_kv_heads),
      block_rows_(std::max(1, kAttentionQueries / group_)),
      kernels_(kernels),
      pool_(pool) {
  MR_CHECK(group_ <= kAttentionQueries);
  for (int t = 0; t < pool.num_threads(); ++t) scratch_.emplace_back(layout.head_dim);
}

void AttentionRunner::Run(std::span<const AttentionRun> runs, int32_t layer, const std::byte* kv,
                          std::span<float* const> queries, std::span<float* const> output) {
  Plan(runs, layer, kv);
  int32_t spans_max = 0;
  for (const Block& block : blocks_) spans_max = std::max(spans_max, block.num_spans);
  const auto tasks = static_cast<int64_t>(blocks_.size()) * layout_.num_kv_heads;
  if (spans_max > 1 && tasks < 2 * pool_.num_threads()) {
    RunSpans(queries, output);
  } else {
    RunBlocks(queries, output);
  }
}

void AttentionRunner::Plan(std::span<const AttentionRun> runs, int32_t layer, const std::byte* kv) {
  pages_.clear();
  blocks_.clear();
  work_ = 0;
  for (const AttentionRun& run : runs) {
    const size_t first_page = pages_.size();
    const int32_t pages = PagesFor(int64_t{run.position} + run.num_rows);
    for (int32_t p = 0; p < pages; ++p) {
      const PageId page = run.segment->pages[static_cast<size_t>(p)];
      pages_.push_back(reinterpret_cast<const char*>(kv + layout_.piece_offset(layer, page)));
    }
    for (int32_t r = 0; r < run.num_rows; r += block_rows_) {
      Block block;
      block.first_row = run.first_row + r;
      block.num_rows = std::min(block_rows_, run.num_rows - r);
      block.position = run.position + r;
      block.first_page = first_page;
      const int64_t keys = int64_t{block.position} + block.num_rows;
      block.num_spans = (PagesFor(keys) + kSpanPages - 1) / kSpanPages;
      work_ += keys * block.num_rows * group_ * layout_.num_kv_heads * layout_.head_dim * 2;
      blocks_.push_back(block);
    }
  }
}

void AttentionRunner::ListQueries(const Block& block, int32_t kv_head, std::span<float* const> queries,
                                  Scratch& scratch) const {
  scratch.queries.clear();
  scratch.num_keys.clear();
  for (int32_t r = 0; r < block.num_rows; ++r) {
    for (int32_t head = kv_head * group_; head < (kv_head + 1) * group_; ++head) {
      scratch.queries.push_back(queries[static_cast<size_t>(block.first_row + r)] + head * layout_.head_dim);
      scratch.num_keys.push_back(block.position + r + 1);
    }
  }
}

void AttentionRunner::Span(const Block& block, int32_t kv_head, int32_t span, const Scratch& scratch,
                           float* partials) const {
  AttentionArgs args{};
  args.queries = scratch.queries.data();
  args.num_keys = scratch.num_keys.data();
  args.pages = pages_.data() + block.first_page;
  args.key_offset = static_cast<int64_t>(layout_.row_offset(0, kv_head, 0));
  args.value_offset = static_cast<int64_t>(layout_.row_offset(1, kv_head, 0));
  args.head_dim = layout_.head_dim;
  args.num_queries = static_cast<int32_t>(scratch.queries.size());
  args.page_begin = span * kSpanPages;
  args.page_end = std::min(args.page_begin + kSpanPages, PagesFor(int64_t{block.position} + block.num_rows));
  args.partials = partials;
  args.scratch = scratch.sums[2];
  layout_.dtype == KvDType::kBf16 ? kernels_.attend_bf16(args) : kernels_.attend_f32(args);
}

void AttentionRunner::Merge(float* into, const float* partials, int32_t count) const {
  const int64_t stride = layout_.head_dim + 2;
  for (int32_t q = 0; q < count; ++q)
    kernels_.merge(into + q * stride, partials + q * stride, layout_.head_dim);
}

void AttentionRunner::Finish(const Block& block, int32_t kv_head, const float* partials,
                             std::span<float* const> output) const {
  for (int32_t r = 0; r < block.num_rows; ++r) {
    for (int32_t head = kv_head * group_; head < (kv_head + 1) * group_; ++head) {
      float* const out = output[static_cast<size_t>(block.first_row + r)] + head * layout_.head_dim;
      const float inverse = 1.0f / partials[layout_.head_dim + 1];
      for (int32_t d = 0; d < layout_.head_dim; ++d) out[d] = partials[d] * inverse;
      partials += layout_.head_dim + 2;
    }
  }
}

void AttentionRunner::RunBlocks(std::span<float* const> queries, std::span<float* const> output) {
  const auto tasks = static_cast<int64_t>(blocks_.size()) * layout_.num_kv_heads;
  pool_.Run(tasks, work_, [&](int64_t task, int thread) {
    // The last blocks have most keys: first, so that threads finish together.
    const Block& block = blocks_[blocks_.size() - 1 - static_cast<size_t>(task / layout_.num_kv_heads)];
    const auto kv_head = static_cast<int32_t>(task % layout_.num_kv_heads);
    Scratch& scratch = scratch_[static_cast<size_t>(thread)];
    ListQueries(block, kv_head, queries, scratch);
    for (int32_t span = 0; span < block.num_spans; ++span) {
      Span(block, kv_head, span, scratch, scratch.sums[span == 0 ? 0 : 1]);
      if (span > 0) Merge(scratch.sums[0], scratch.sums[1], static_cast<int32_t>(scratch.queries.size()));
    }
    Finish(block, kv_head, scratch.sums[0], output);
  });
}

void AttentionRunner::RunSpans(std::span<float* const> queries, std::span<float* const> output) {
  const int64_t stride = layout_.head_dim + 2;
  const auto block_floats = [&](const Block& block) {
    return static_cast<size_t>(block.num_rows * group_ * stride);
  };
  shares_.clear();
  size_t floats = 0;
  for (size_t b = 0; b < blocks_.size(); ++b) {
    blocks_[b].first_partial = floats;
    floats += block_floats(blocks_[b]) * static_cast<size_t>(blocks_[b].num_spans * layout_.num_kv_heads);
    for (int32_t span = 0; span < blocks_[b].num_spans; ++span)
      shares_.emplace_back(static_cast<int32_t>(b), span);
  }
  if (partials_.size() < floats) partials_.resize(floats);  // grows with the longest context so far
  const auto partials_of = [&](const Block& block, int32_t kv_head, int32_t span) {
    const auto index = static_cast<size_t>(kv_head * block.num_spans + span);
    return partials_.data() + block.first_partial + index * block_floats(block);
  };
  pool_.Run(static_cast<int64_t>(shares_.size()) * layout_.num_kv_heads, work_,
            [&](int64_t task, int thread) {
              const auto [b, span] = shares_[static_cast<size_t>(task / layout_.num_kv_heads)];
              const auto kv_head = static_cast<int32_t>(task % layout_.num_kv_heads);
              const Block& block = blocks_[static_cast<size_t>(b)];
              Scratch& scratch = scratch_[static_cast<size_t>(thread)];
              ListQueries(block, kv_head, queries, scratch);
              Span(block, kv_head, span, scratch, partials_of(block, kv_head, span));
            });
  for (const Block& block : blocks_) {
    for (int32_t kv_head = 0; kv_head < layout_.num_kv_heads; ++kv_head) {
      float* const into = partials_of(block, kv_head, 0);
      for (int32_t span = 1; span < block.num_spans; ++span) {
        Merge(into, partials_of(block, kv_head, span), block.num_rows * group_);
      }
      Finish(block, kv_head, into, output);
    }
  }
}

}  // namespace millrace::engine
