// What a step's kernels are told, on the host alone: rows in their order, padding that touches nobody, places
// that depend on counts alone.
#include <gtest/gtest.h>

#include <numeric>
#include <vector>

#include "engine/backend/cuda/step_inputs.h"

namespace millrace::engine::cuda {
namespace {

constexpr int32_t kUntouched = -77;

// Segments and what they borrow.
struct Steps {
  void Add(int32_t position, int32_t count, int32_t num_logits, std::vector<PageId> pages, bool mtp = false) {
    std::vector<int32_t>& row = tokens.emplace_back(count);
    std::iota(row.begin(), row.end(), 1000 * static_cast<int32_t>(tokens.size()));
    std::vector<int32_t>& after = next.emplace_back(row);
    for (int32_t& token : after) token += 500;
    tables.push_back(std::move(pages));
    Segment& segment = batch.segments.emplace_back();
    segment.position = position;
    segment.num_logits = num_logits;
    segment.tokens = row;
    segment.pages = tables.back();
    if (mtp) segment.next_tokens = after;
  }
  Batch batch;
  std::vector<std::vector<int32_t>> tokens = Reserved<int32_t>();
  std::vector<std::vector<int32_t>> next = Reserved<int32_t>();
  std::vector<std::vector<PageId>> tables = Reserved<PageId>();

 private:
  template <typename T>
  static std::vector<std::vector<T>> Reserved() {
    std::vector<std::vector<T>> arrays;
    arrays.reserve(16);  // segments point into them
    return arrays;
  }
};

struct Filled {
  Filled(const Batch& batch, PassKind kind, const PassCounts& padded, int64_t stride)
      : block(InputsSize(padded), kUntouched),
        table(static_cast<size_t>(padded.sequences() * stride), kUntouched),
        inputs(PlaceInputs(block.data(), padded)) {
    FillPass(batch, kind, padded, inputs, table.data(), stride);
  }
  std::vector<int32_t> block;
  std::vector<int32_t> table;
  PassInputs inputs;
};

std::vector<int32_t> Take(const int32_t* array, int32_t count) { return {array, array + count}; }
using Numbers = std::vector<int32_t>;

// A prompt, a decode, a chunk with a page boundary inside, another decode: not sorted.
Steps Mixed() {
  Steps steps;
  steps.Add(0, 3, 1, {7});
  steps.Add(64, 1, 1, {4, 9});
  steps.Add(62, 4, 2, {3, 5}, true);
  steps.Add(10, 1, 1, {6}, true);
  return steps;
}

TEST(CudaStepInputs, SinglesComeFirstAndLogitsInSegmentOrder) {
  const Steps steps = Mixed();
  const PassCounts counts = CountPass(steps.batch, PassKind::kMain);
  EXPECT_EQ(counts.rows, 9);
  EXPECT_EQ(counts.singles, 2);
  EXPECT_EQ(counts.longer, 2);
  EXPECT_EQ(counts.logits, 5);
  EXPECT_EQ(PagesMax(steps.batch), 2);
  PassCounts padded = counts;
  padded.rows = 12;
  padded.logits = 8;
  padded.singles = 4;
  const Filled got(steps.batch, PassKind::kMain, padded, 3);
  EXPECT_EQ(*got.inputs.valid_rows, 9);
  EXPECT_EQ(Take(got.inputs.tokens, 12),
            (Numbers{2000, 4000, 1000, 1001, 1002, 3000, 3001, 3002, 3003, 0, 0, 0}));
  EXPECT_EQ(Take(got.inputs.positions, 12), (Numbers{64, 10, 0, 1, 2, 62, 63, 64, 65, 0, 0, 0}));
  EXPECT_EQ(Take(got.inputs.kv_slots, 12),
            (Numbers{9 * 64, 6 * 64 + 10, 7 * 64, 7 * 64 + 1, 7 * 64 + 2, 3 * 64 + 62, 3 * 64 + 63, 5 * 64,
                     5 * 64 + 1, -1, -1, -1}));
  EXPECT_EQ(Take(got.inputs.logit_rows, 8), (Numbers{4, 0, 7, 8, 1, 0, 0, 0}));
  EXPECT_EQ(Take(got.inputs.lengths, 6), (Numbers{65, 11, 0, 0, 3, 66}));
  EXPECT_EQ(Take(got.inputs.row_begin, 3), (Numbers{0, 3, 7}));
  EXPECT_EQ(got.table,
            (Numbers{4, 9, kUntouched, 6, kUntouched, kUntouched, kUntouched, kUntouched, kUntouched,
                     kUntouched, kUntouched, kUntouched, 7, kUntouched, kUntouched, 3, 5, kUntouched}));
}

TEST(CudaStepInputs, TheMtpPassNamesTheRowsOfTheMainPass) {
  const Steps steps = Mixed();
  const PassCounts counts = CountPass(steps.batch, PassKind::kMtp);
  EXPECT_EQ(counts.rows, 5);
  EXPECT_EQ(counts.singles, 1);
  EXPECT_EQ(counts.longer, 1);
  EXPECT_EQ(counts.logits, 3);
  PassCounts padded = counts;
  padded.rows = 8;
  const Filled got(steps.batch, PassKind::kMtp, padded, 2);
  EXPECT_EQ(Take(got.inputs.tokens, 8), (Numbers{4500, 3500, 3501, 3502, 3503, 0, 0, 0}));
  EXPECT_EQ(Take(got.inputs.source, 8), (Numbers{1, 5, 6, 7, 8, 0, 0, 0}));
  EXPECT_EQ(Take(got.inputs.logit_rows, 3), (Numbers{3, 4, 0}));
  EXPECT_EQ(Take(got.inputs.lengths, 2), (Numbers{11, 66}));
  EXPECT_EQ(got.table, (Numbers{6, kUntouched, 3, 5}));
}

TEST(CudaStepInputs, AnEmptyBatchIsAllPadding) {
  PassCounts padded;
  padded.rows = padded.singles = padded.logits = 4;
  const Filled got(Batch(), PassKind::kMain, padded, 2);
  EXPECT_EQ(*got.inputs.valid_rows, 0);
  EXPECT_EQ(Take(got.inputs.kv_slots, 4), (Numbers{-1, -1, -1, -1}));
  EXPECT_EQ(Take(got.inputs.lengths, 4), (Numbers{0, 0, 0, 0}));
  EXPECT_EQ(Take(got.inputs.logit_rows, 4), (Numbers{0, 0, 0, 0}));
  EXPECT_EQ(got.table, Numbers(8, kUntouched));
}

// A captured graph finds every array again, and 16-byte loads are possible.
TEST(CudaStepInputs, PlacesDependOnCountsAloneAndNeverOverlap) {
  for (const PassCounts counts :
       {PassCounts{1, 1, 1, 0}, PassCounts{13, 5, 3, 2}, PassCounts{512, 64, 0, 7}}) {
    std::vector<int32_t> a(InputsSize(counts)), b(InputsSize(counts));
    const PassInputs in_a = PlaceInputs(a.data(), counts), in_b = PlaceInputs(b.data(), counts);
    const auto arrays = [](const PassInputs& in) {
      return std::vector<int32_t*>{in.valid_rows, in.tokens,    in.positions, in.kv_slots, in.logit_rows,
                                   in.lengths,    in.row_begin, in.source,    in.end};
    };
    const int32_t sizes[] = {1,
                             counts.rows,
                             counts.rows,
                             counts.rows,
                             counts.logits,
                             counts.sequences(),
                             counts.longer + 1,
                             counts.rows,
                             0};
    for (size_t i = 0; i < arrays(in_a).size(); ++i) {
      EXPECT_EQ(arrays(in_a)[i] - a.data(), arrays(in_b)[i] - b.data());
      EXPECT_EQ((arrays(in_a)[i] - a.data()) % 4, 0);
      if (i > 0) {
        EXPECT_GE(arrays(in_a)[i], arrays(in_a)[i - 1] + sizes[i - 1]);
      }
    }
    EXPECT_EQ(in_a.end, a.data() + a.size());
  }
}

}  // namespace
}  // namespace millrace::engine::cuda
