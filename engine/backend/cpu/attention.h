#pragma once
// Attention of a step over paged KV. A task is one kv head of a block of consecutive tokens, so that the
// query heads that share it, and the tokens of a chunk, read each key once.
//
// Keys are taken in spans of 1024 whose partial results are merged in ascending order, whether one thread
// goes through all spans or (few tokens, long context) several threads share them: a query's result depends
// on its keys alone.

#include <vector>

#include "engine/backend/cpu/activations.h"
#include "engine/backend/cpu/kernels.h"
#include "engine/backend/cpu/thread_pool.h"
#include "engine/batch.h"
#include "engine/kv/layout.h"

namespace millrace::engine {

// Consecutive rows of the step that belong to one sequence.
struct AttentionRun {
  const Segment* segment = nullptr;
  int32_t first_row = 0;
  int32_t num_rows = 0;
  int32_t position = 0;  // of the first row
};

// Scratch of one backend. One step at a time.
class AttentionRunner {
 public:
  AttentionRunner(const KvLayout& layout, int32_t num_heads, const KernelTable& kernels, ThreadPool& pool);

  // queries[row]: [heads * head_dim], scaled; output likewise. `kv` is the pool's memory.
  void Run(std::span<const AttentionRun> runs, int32_t layer, const std::byte* kv,
           std::span<float* const> queries, std::span<float* const> output);

 private:
  struct Block {
    int32_t first_row = 0;
    int32_t num_rows = 0;
    int32_t position = 0;
    size_t first_page = 0;  // of the sequence, into pages_
    int32_t num_spans = 0;
    size_t first_partial = 0;  // when spans are shared: into partials_
  };
  // Per thread.
  struct Scratch {
    Scratch(int32_t head_dim);
    Rows sums;  // two sets of partials, then the kernel's own
    std::vector<const float*> queries;
    std::vector<int32_t> num_keys;
  };
  void Plan(std::span<const AttentionRun> runs, int32_t layer, const std::byte* kv);
  void ListQueries(const Block& block, int32_t kv_head, std::span<float* const> queries,
                   Scratch& scratch) const;
  void Span(const Block& block, int32_t kv_head, int32_t span, const Scratch& scratch, float* partials) const;
  void Merge(float* into, const float* partials, int32_t count) const;
  void Finish(const Block& block, int32_t kv_head, const float* partials,
              std::span<float* const> output) const;
  void RunBlocks(std::span<float* const> queries, std::span<float* const> output);
  void RunSpans(std::span<float* const> queries, std::span<float* const> output);

  const KvLayout layout_;
  const int32_t group_;       // query heads per kv head
  const int32_t block_rows_;  // tokens per block
  const KernelTable& kernels_;
  ThreadPool& pool_;
  std::vector<Scratch> scratch_;
  std::vector<const char*> pages_;  // of this layer
  std::vector<Block> blocks_;
  std::vector<std::pair<int32_t, int32_t>> shares_;  // (block, span), when spans are shared
  std::vector<float> partials_;
  int64_t work_ = 0;
};

}  // namespace millrace::engine
