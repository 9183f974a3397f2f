#include "engine/backend/cuda/step_inputs.h"

#include <algorithm>

namespace millrace::engine::cuda {
namespace {

int32_t PagesOf(const Segment& segment) {
  return PagesFor(segment.position + static_cast<int64_t>(segment.tokens.size()));
}

RowInputs PlaceRows(int32_t*& at, int32_t rows, int32_t logits) {
  RowInputs placed;
  const auto take = [&at](int32_t count) {
    int32_t* const begin = at;
    at += (count + 3) / 4 * 4;  // 16-byte boundaries
    return begin;
  };
  placed.valid_rows = take(1);
  placed.tokens = take(rows);
  placed.positions = take(rows);
  placed.kv_slots = take(rows);
  placed.num_keys = take(rows);
  placed.page_begin = take(rows);
  placed.logit_rows = take(logits);
  return placed;
}

// Writes one segment's rows from `row` on; returns the row after them.
int32_t FillSegment(const Segment& segment, std::span<const int32_t> tokens, int32_t page_begin,
                    const RowInputs& rows, int32_t row) {
  for (size_t i = 0; i < tokens.size(); ++i, ++row) {
    const int32_t position = segment.position + static_cast<int32_t>(i);
    rows.tokens[row] = tokens[i];
    rows.positions[row] = position;
    rows.kv_slots[row] =
        segment.pages[static_cast<size_t>(position / kPageTokens)] * kPageTokens + position % kPageTokens;
    rows.num_keys[row] = position + 1;
    rows.page_begin[row] = page_begin;
  }
  return row;
}

void Pad(const RowInputs& rows, int32_t row, int32_t padded_rows, int32_t logit, int32_t padded_logits) {
  *rows.valid_rows = row;
  for (; row < padded_rows; ++row) {
    rows.tokens[row] = 0;
    rows.positions[row] = 0;
    rows.kv_slots[row] = -1;
    rows.num_keys[row] = 0;
    rows.page_begin[row] = 0;
  }
  for (; logit < padded_logits; ++logit) rows.logit_rows[logit] = 0;
}

}  // namespace

StepInputs StepInputs::Place(int32_t* base, int32_t rows, int32_t logits, int32_t mtp_rows,
                             int32_t mtp_logits) {
  StepInputs inputs;
  inputs.main = PlaceRows(base, rows, logits);
  inputs.mtp = PlaceRows(base, mtp_rows, mtp_logits);
  inputs.mtp_source = base;
  inputs.pages = base + (mtp_rows + 3) / 4 * 4;
  return inputs;
}

StepCounts CountBatch(const Batch& batch) {
  StepCounts counts;
  for (const Segment& segment : batch.segments) {
    const auto tokens = static_cast<int32_t>(segment.tokens.size());
    counts.rows += tokens;
    counts.logits += segment.num_logits;
    counts.pages += PagesOf(segment);
    if (segment.next_tokens.empty()) continue;
    counts.mtp_rows += tokens;
    counts.mtp_logits += segment.num_logits;
  }
  return counts;
}

void FillInputs(const Batch& batch, const StepCounts& padded, const StepInputs& inputs) {
  int32_t row = 0, logit = 0, mtp_row = 0, mtp_logit = 0, page = 0;
  for (const Segment& segment : batch.segments) {
    const int32_t num_pages = PagesOf(segment);
    std::copy_n(segment.pages.begin(), num_pages, inputs.pages + page);
    const int32_t begin = row;
    row = FillSegment(segment, segment.tokens, page, inputs.main, row);
    for (int32_t i = row - segment.num_logits; i < row; ++i) inputs.main.logit_rows[logit++] = i;
    if (!segment.next_tokens.empty()) {
      for (int32_t i = begin; i < row; ++i) inputs.mtp_source[mtp_row + i - begin] = i;
      mtp_row = FillSegment(segment, segment.next_tokens, page, inputs.mtp, mtp_row);
      for (int32_t i = mtp_row - segment.num_logits; i < mtp_row; ++i) inputs.mtp.logit_rows[mtp_logit++] = i;
    }
    page += num_pages;
  }
  Pad(inputs.main, row, padded.rows, logit, padded.logits);
  Pad(inputs.mtp, mtp_row, padded.mtp_rows, mtp_logit, padded.mtp_logits);
  for (int32_t r = mtp_row; r < padded.mtp_rows; ++r) inputs.mtp_source[r] = 0;
}

}  // namespace millrace::engine::cuda
