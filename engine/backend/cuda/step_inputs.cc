#include "engine/backend/cuda/step_inputs.h"

#include <algorithm>

namespace millrace::engine::cuda {
namespace {

int32_t PagesOf(const Segment& segment) {
  return PagesFor(segment.position + static_cast<int64_t>(segment.tokens.size()));
}

bool Covers(PassKind kind, const Segment& segment) {
  return kind == PassKind::kMain || !segment.next_tokens.empty();
}

// Writes the rows of one segment from `row` on.
void FillRows(const Segment& segment, PassKind kind, const PassInputs& inputs, int32_t row) {
  const auto tokens = kind == PassKind::kMain ? segment.tokens : segment.next_tokens;
  for (size_t i = 0; i < tokens.size(); ++i, ++row) {
    const int32_t position = segment.position + static_cast<int32_t>(i);
    inputs.tokens[row] = tokens[i];
    inputs.positions[row] = position;
    inputs.kv_slots[row] =
        segment.pages[static_cast<size_t>(position / kPageTokens)] * kPageTokens + position % kPageTokens;
  }
}

}  // namespace

namespace {

// Hands each array and its length to `place`, in order.
template <typename Place>
void EachArray(const PassCounts& counts, PassInputs& inputs, const Place& place) {
  place(inputs.valid_rows, 1);
  place(inputs.tokens, counts.rows);
  place(inputs.positions, counts.rows);
  place(inputs.kv_slots, counts.rows);
  place(inputs.logit_rows, counts.logits);
  place(inputs.lengths, counts.sequences());
  place(inputs.row_begin, counts.longer + 1);
  place(inputs.source, counts.rows);
  place(inputs.end, 0);
}

int32_t Aligned(int32_t count) { return (count + 3) / 4 * 4; }  // 16-byte boundaries

}  // namespace

PassInputs PlaceInputs(int32_t* base, const PassCounts& counts) {
  PassInputs placed;
  EachArray(counts, placed, [&base](int32_t*& array, int32_t count) {
    array = base;
    base += Aligned(count);
  });
  return placed;
}

size_t InputsSize(const PassCounts& counts) {
  size_t size = 0;
  PassInputs unused;
  EachArray(counts, unused,
            [&size](int32_t*&, int32_t count) { size += static_cast<size_t>(Aligned(count)); });
  return size;
}

PassCounts CountPass(const Batch& batch, PassKind kind) {
  PassCounts counts;
  for (const Segment& segment : batch.segments) {
    if (!Covers(kind, segment)) continue;
    counts.rows += static_cast<int32_t>(segment.tokens.size());
    counts.logits += segment.num_logits;
    ++(segment.tokens.size() == 1 ? counts.singles : counts.longer);
  }
  return counts;
}

int32_t PagesMax(const Batch& batch) {
  int32_t pages = 0;
  for (const Segment& segment : batch.segments) pages = std::max(pages, PagesOf(segment));
  return pages;
}

void FillPass(const Batch& batch, PassKind kind, const PassCounts& padded, const PassInputs& inputs,
              int32_t* page_table, int64_t table_stride) {
  const PassCounts counts = CountPass(batch, kind);
  int32_t single = 0;            // next row and sequence of a single-token segment
  int32_t longer = 0;            // next longer segment
  int32_t row = counts.singles;  // next row of a longer segment
  int32_t main_single = 0;       // the same two in the main pass
  int32_t main_row = CountPass(batch, PassKind::kMain).singles;
  int32_t logit = 0;
  for (const Segment& segment : batch.segments) {
    const auto tokens = static_cast<int32_t>(segment.tokens.size());
    int32_t& main_next = tokens == 1 ? main_single : main_row;
    const int32_t main_begin = main_next;
    main_next += tokens;
    if (!Covers(kind, segment)) continue;
    const int32_t begin = tokens == 1 ? single : row;
    const int32_t sequence = tokens == 1 ? single : padded.singles + longer;
    if (tokens == 1) {
      ++single;
    } else {
      inputs.row_begin[longer++] = row - counts.singles;
      row += tokens;
    }
    FillRows(segment, kind, inputs, begin);
    for (int32_t i = 0; i < tokens; ++i) inputs.source[begin + i] = main_begin + i;
    for (int32_t i = tokens - segment.num_logits; i < tokens; ++i) inputs.logit_rows[logit++] = begin + i;
    inputs.lengths[sequence] = segment.position + tokens;
    std::copy_n(segment.pages.begin(), PagesOf(segment), page_table + sequence * table_stride);
  }
  *inputs.valid_rows = counts.rows;
  inputs.row_begin[longer] = row - counts.singles;
  std::fill(inputs.lengths + counts.singles, inputs.lengths + padded.singles, 0);
  std::fill(inputs.logit_rows + logit, inputs.logit_rows + padded.logits, 0);
  for (int32_t r = counts.rows; r < padded.rows; ++r) {
    inputs.tokens[r] = inputs.positions[r] = inputs.source[r] = 0;
    inputs.kv_slots[r] = -1;
  }
}

}  // namespace millrace::engine::cuda
